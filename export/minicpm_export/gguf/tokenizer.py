"""A tokenizer as llama.cpp keeps it in a GGUF: tokens, their kinds, merges, special ids and the chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gguf import GGUFValueType, Keys, TokenType

from minicpm_edge.errors import UserError
from minicpm_edge.formats.generation import GenerationSettings
from minicpm_edge.model.config import ModelConfig
from minicpm_edge.text.sentencepiece import USER_DEFINED, read_pieces
from minicpm_edge.text.tokenizer import SPLIT_PATTERN, Tokenizer

U32, I32, F32, BOOL, STRING, ARRAY = (
    GGUFValueType.UINT32,
    GGUFValueType.INT32,
    GGUFValueType.FLOAT32,
    GGUFValueType.BOOL,
    GGUFValueType.STRING,
    GGUFValueType.ARRAY,
)
Entry = tuple[str, GGUFValueType, Any]

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_LLAMA3 = _CONTRACTIONS + _WORDS % r"\p{N}{1,3}"
_QWEN2 = _CONTRACTIONS + _WORDS % r"\p{N}"
_GPT2 = "gpt-2"  # ByteLevel's own pattern (use_regex)

# How the text is split, and whether a piece that is a token skips the merges → llama.cpp's name for both.
PRE_TOKENIZERS: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((SPLIT_PATTERN,), True): "llama-bpe",
    ((_LLAMA3,), True): "llama-bpe",
    ((SPLIT_PATTERN,), False): "smaug-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    (("digits", _GPT2), False): "smollm",
    ((_GPT2,), False): "gpt-2",
}
# Tokens that end a turn, the likeliest first: llama.cpp stops at the one named in eot_token_id.
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
# generation_config.json → where llama.cpp's programs look for recommended sampling.
SAMPLING_KEYS = {
    "temperature": ("general.sampling.temp", F32),
    "top_k": ("general.sampling.top_k", I32),
    "top_p": ("general.sampling.top_p", F32),
    "min_p": ("general.sampling.min_p", F32),
    "repetition_penalty": ("general.sampling.penalty_repeat", F32),
}


def tokenizer_keys(
    tokenizer: Tokenizer, config: ModelConfig, generation: GenerationSettings
) -> Iterator[Entry]:
    """Every ``tokenizer.*`` and ``general.sampling.*`` key.

    Raises:
        UserError: for a tokenizer that llama.cpp would read differently.
    """
    # Rows of the model that no token uses get texts of their own: llama.cpp aborts on one that it has seen before.
    texts = [f"[UNUSED_{index}]" for index in range(config.vocab_size)]
    kinds = [TokenType.UNUSED] * config.vocab_size
    for token, index in tokenizer.vocab.items():
        texts[index], kinds[index] = token, TokenType.NORMAL
    if tokenizer.sentencepiece is not None:
        _mark_pieces(tokenizer, texts, kinds)
    for token in tokenizer.definition["added_tokens"]:
        kinds[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    if tokenizer.is_byte_level:
        yield from _byte_level(tokenizer.definition)
    else:
        yield from _sentencepiece(tokenizer, texts, kinds)
    yield Keys.Tokenizer.LIST, ARRAY, texts
    yield Keys.Tokenizer.TOKEN_TYPE, ARRAY, [int(kind) for kind in kinds]
    yield Keys.Tokenizer.BOS_ID, U32, tokenizer.bos_id
    yield Keys.Tokenizer.EOS_ID, U32, tokenizer.eos_id
    named = {text: index for text, index in tokenizer.special_tokens.items() if text in END_OF_TURN}
    ends = [named[text] for text in END_OF_TURN if text in named]
    ends += [index for index in generation.stop_ids if index not in (*ends, tokenizer.eos_id)]
    # Two keys for all that end an answer beside the end of text; further ones llama.cpp knows by their names only.
    for key, index in zip((Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID), ends, strict=False):
        yield key, U32, index
    if generation.pad_id is not None:
        yield Keys.Tokenizer.PAD_ID, U32, generation.pad_id
    for name, (key, kind) in SAMPLING_KEYS.items():
        if name in generation.sampling and generation.sampling.get("do_sample", True):
            yield key, kind, generation.sampling[name]
    yield Keys.Tokenizer.ADD_BOS, BOOL, tokenizer.adds_bos
    yield Keys.Tokenizer.ADD_EOS, BOOL, False
    if tokenizer.chat_template:
        yield Keys.Tokenizer.CHAT_TEMPLATE, STRING, tokenizer.chat_template


def _mark_pieces(tokenizer: Tokenizer, texts: Sequence[str], kinds: list[TokenType]) -> None:
    """Kinds as the model's own ``tokenizer.model`` has them, where its pieces are the vocabulary's tokens."""
    assert tokenizer.sentencepiece is not None
    try:
        pieces = read_pieces(tokenizer.sentencepiece)
    except ValueError as error:
        raise UserError(f"the model's tokenizer.model is not a SentencePiece model: {error}") from None
    for index, piece in enumerate(pieces):
        if index >= len(texts) or piece.text != texts[index] or not piece.text:
            continue
        # llama.cpp finds a user-defined token in any text. A tokenizer.json that came with the pieces may not.
        if piece.kind != USER_DEFINED or index in tokenizer.encode(f"a{piece.text}a"):
            kinds[index] = TokenType(piece.kind)


def _byte_level(definition: Mapping[str, Any]) -> Iterator[Entry]:
    model = definition["model"]
    if model["type"] != "BPE":
        raise UserError(f"a {model['type']} tokenizer has no form in GGUF; byte-level BPE has")
    if definition.get("normalizer"):
        raise UserError("this byte-level tokenizer normalises its text, which llama.cpp would not do")
    split = tuple(_patterns(definition["pre_tokenizer"])), bool(model.get("ignore_merges"))
    if split not in PRE_TOKENIZERS:
        raise UserError(
            f"llama.cpp has no name for this tokenizer's way of splitting text ({', '.join(split[0])}); "
            f"known: {', '.join(sorted(set(PRE_TOKENIZERS.values())))}"
        )
    yield Keys.Tokenizer.MODEL, STRING, "gpt2"
    yield Keys.Tokenizer.PRE, STRING, PRE_TOKENIZERS[split]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    yield Keys.Tokenizer.MERGES, ARRAY, merges


def _patterns(step: Mapping[str, Any]) -> Iterator[str]:
    """The rules a pre-tokenizer splits by, in order; anything unknown shows under its own name and matches no row."""
    match step["type"]:
        case "Sequence":
            for part in step["pretokenizers"]:
                yield from _patterns(part)
        case "Split" if step["behavior"] == "Isolated" and not step.get("invert"):
            yield step["pattern"].get("Regex", json.dumps(step["pattern"]))
        case "Digits" if step["individual_digits"]:
            yield "digits"
        case "ByteLevel" if not step["add_prefix_space"]:
            if step.get("use_regex", True):
                yield _GPT2
        case other:
            yield f"{other} {json.dumps(step)}"


def _sentencepiece(tokenizer: Tokenizer, texts: list[str], kinds: list[TokenType]) -> Iterator[Entry]:
    """SentencePiece BPE: llama.cpp joins the pair whose result has the highest score, so scores are merge ranks.

    Marks the byte and unknown tokens in ``kinds``.
    """
    model = tokenizer.definition["model"]
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        raise UserError(
            f"a {model['type']} tokenizer without byte fallback has no form in GGUF that keeps its ids"
        )
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault("".join(merge) if isinstance(merge, list) else merge.replace(" ", ""), rank)
    for index, text in enumerate(texts):
        if kinds[index] == TokenType.NORMAL and re.fullmatch(r"<0x[0-9A-F]{2}>", text):
            kinds[index] = TokenType.BYTE
    if model.get("unk_token") is not None:
        unknown = tokenizer.vocab[model["unk_token"]]
        kinds[unknown] = TokenType.UNKNOWN
        yield Keys.Tokenizer.UNK_ID, U32, unknown
    yield Keys.Tokenizer.MODEL, STRING, "llama"
    yield Keys.Tokenizer.PRE, STRING, "default"
    yield Keys.Tokenizer.SCORES, ARRAY, [-float(ranks.get(text, len(ranks))) for text in texts]
    yield Keys.Tokenizer.ADD_PREFIX, BOOL, tokenizer.adds_space
