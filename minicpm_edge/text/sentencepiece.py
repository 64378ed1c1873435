"""Converts a SentencePiece ``tokenizer.model`` to the `tokenizers` format.

The file is one protocol-buffer message (sentencepiece_model.proto of google/sentencepiece); the few fields that
decide the ids are read here by hand: forty lines, where the sentencepiece package would be a compiled dependency
of core for them, and the conversion below is needed with either.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from minicpm_edge.errors import UserError

UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# The score of pieces that text cannot spell, "<unk>" and "<0x0A>" among them.
NEVER = -1e6
SPACE = "▁"
# Characters; pieces are at most 16 long by default.
MAX_MERGE_PIECE = 64


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One token: its text, its score (higher merges first) and its kind (``Type`` in the .proto)."""

    text: str
    score: float
    kind: int


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of one message: int for varints, bytes for the rest."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(message, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(message):
            raise ValueError("a field is longer than the file")
        yield number, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("the file ends early")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number is too long")


def _piece(message: bytes) -> Piece:
    fields: dict[int, Any] = dict(_fields(message))
    score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
    return Piece(text=fields.get(1, b"").decode(), score=score, kind=fields.get(3, 1))


def read_pieces(content: bytes) -> list[Piece]:
    """All tokens of a ``tokenizer.model`` by id.

    Raises:
        ValueError: for something else.
    """
    return [_piece(value) for number, value in _fields(content) if number == 1]


def convert(content: bytes, path: Path, *, special: Container[str] = ()) -> tuple[str, dict[str, Any]]:
    """(tokenizer.json text, tokenizer_config.json content) that give the ids of SentencePiece file ``content``.

    Args:
        content: the bytes of the file.
        path: its name, for messages.
        special: pieces that the folder's settings mark as special: they are not found in plain text, even where the
            file has them as user-defined.

    Raises:
        UserError: naming ``path``, when it is not a SentencePiece model of type BPE or unigram.
    """
    try:
        sections: dict[int, Any] = {number: value for number, value in _fields(content) if number != 1}
        pieces = read_pieces(content)
        trainer: dict[int, Any] = dict(_fields(sections.get(2, b"")))
        normalizer: dict[int, Any] = dict(_fields(sections.get(3, b"")))
        if not pieces:
            raise ValueError("it holds no tokens")
        return _build(pieces, trainer, normalizer, special)
    except (ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise UserError(f"{path} is not a SentencePiece model: {error}") from error


def _build(
    pieces: list[Piece], trainer: dict[int, Any], normalizer: dict[int, Any], special: Container[str]
) -> tuple[str, dict[str, Any]]:
    kind, byte_fallback, unknown = trainer.get(3, UNIGRAM), bool(trainer.get(35, 0)), trainer.get(40, 0)
    bos, eos = (_signed(trainer.get(field, default)) for field, default in ((41, 1), (42, 2)))
    user_defined = [
        piece.text for piece in pieces if piece.kind == USER_DEFINED and piece.text not in special
    ]
    if kind == BPE:
        model: Any = models.BPE(
            vocab={piece.text: index for index, piece in enumerate(pieces)},
            merges=_merges(pieces),
            unk_token=pieces[unknown].text,
            fuse_unk=True,
            byte_fallback=byte_fallback,
            # A user-defined piece is split off below and taken whole.
            ignore_merges=bool(user_defined),
        )
    elif kind == UNIGRAM:
        found_in_text = (NORMAL, USER_DEFINED)
        scores = [(piece.text, piece.score if piece.kind in found_in_text else NEVER) for piece in pieces]
        model = models.Unigram(scores, unk_id=unknown, byte_fallback=byte_fallback)
    else:
        raise ValueError(f"its model type {kind} is neither BPE nor unigram")
    backend = tokenizers.Tokenizer(model)
    adds_space = bool(normalizer.get(3, 1))
    backend.normalizer = normalizers.Sequence(list(_normalizers(normalizer, adds_space)))
    if user_defined:
        longest_first = sorted(user_defined, key=len, reverse=True)
        backend.pre_tokenizer = pre_tokenizers.Split(
            Regex("|".join(map(re.escape, longest_first))), behavior="isolated"
        )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if adds_space else steps)
    specials = (piece for piece in pieces if piece.kind in (CONTROL, USER_DEFINED))
    control = [
        piece.text for piece in specials if piece.text and (piece.kind == CONTROL or piece.text in special)
    ]
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": pieces[unknown].text,
        "clean_up_tokenization_spaces": False,
    }
    if eos >= 0:
        config["eos_token"] = pieces[eos].text
    if bos >= 0:
        begin = pieces[bos].text
        config["bos_token"] = begin
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, bos)]
        )
    return backend.to_str(), config


def _normalizers(spec: dict[int, Any], adds_space: bool) -> Iterator[Any]:
    if spec.get(2):
        yield normalizers.Precompiled(spec[2])
    if spec.get(4, 1):
        yield normalizers.Strip()
        yield normalizers.Replace(Regex(" {2,}"), " ")
    if adds_space:
        yield normalizers.Prepend(SPACE)
    if spec.get(5, 1):
        yield normalizers.Replace(" ", SPACE)


def _merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces, in the order in which SentencePiece would join them."""
    scores = {piece.text: piece.score for piece in pieces if piece.kind == NORMAL}
    found = [
        (-score, text[:cut], text[cut:])
        for text, score in scores.items()
        if len(text) <= MAX_MERGE_PIECE
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    return [(left, right) for _, left, right in sorted(found, key=lambda merge: merge[0])]


def _signed(value: int) -> int:
    """A varint as the signed 32-bit number it stands for (-1: there is no such token)."""
    return value - (1 << 64) if value >= 1 << 63 else value
