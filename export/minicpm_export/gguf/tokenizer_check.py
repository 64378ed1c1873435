"""Compares llama.cpp's tokenizer, read from a GGUF, with the model's own, string by string."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from minicpm_edge.formats.generation import GenerationSettings
from minicpm_edge.text.sentencepiece import USER_DEFINED, read_pieces
from minicpm_edge.text.tokenizer import Tokenizer
from minicpm_export.gguf.runtime import LlamaRuntime
from minicpm_export.verify.windows import built_in_text

# Strings on which tokenizers differ most readily; the long list is in the tests.
TOKENIZER_EDGE_CASES = (
    "",
    "  a  b\t\n\n c",
    "naïve café 東京 ٣ 👩‍👩‍👧",
    "<s></s><|im_end|>",
    "x = 12345.678e-9 # don't",
    "\r\n\0\x7f",
)
# Models have a handful of them, or some hundreds that are all alike.
MAX_ADDED_TOKENS = 64


def compare_tokenizers(
    file: Path, tokenizer: Tokenizer, generation: GenerationSettings
) -> tuple[list[str], list[str]]:
    """(failures, notes), one line each: strings that llama.cpp splits differently.

    Added tokens are looked for amid text, as plain text and as special tokens. A note, and no failure, is what GGUF
    cannot say: llama.cpp's SentencePiece puts a space before every text, and before all that follows an added token.
    """
    num_spaced = 0
    with LlamaRuntime(file, context_length=32) as runtime:
        texts = (*TOKENIZER_EDGE_CASES, built_in_text())
        differing = [text for text in texts if runtime.tokenize(text) != tokenizer.encode(text)]
        # Metaspace puts no space before a text that has one, llama.cpp always does.
        doubled = [
            text
            for text in differing
            if text.startswith(" ") and runtime.tokenize(text) == tokenizer.encode(f" {text}")
        ]
        failures = [
            f"llama.cpp's tokenizer gives other ids than ours for {text[:40]!r}"
            for text in differing
            if text not in doubled
        ]
        for token, index in added_tokens(tokenizer)[:MAX_ADDED_TOKENS]:
            text = f"a{token}b"
            apart = [*tokenizer.encode("a"), index, *tokenizer.encode("b")]
            for special in (False, True):
                got, expected = (
                    runtime.tokenize(text, special=special),
                    tokenizer.encode(text, special=special),
                )
                if got != expected and not (got == apart and index in expected):
                    kind = "as a special token" if special else "in plain text"
                    failures.append(f"llama.cpp reads {token!r} {kind} as other ids than ours")
                num_spaced += got != expected and got == apart and index in expected
        failures += _wrong_ids(runtime, tokenizer, generation)
        missed = [index for index in generation.stop_ids if not runtime.ends_answer(index)]
    notes = []
    if num_spaced:
        notes.append("llama.cpp puts a space before text that follows an added token, the tokenizer does not")
    if doubled:
        notes.append("llama.cpp puts a space before a text that begins with one too, the tokenizer does not")
    # Keys for two of them beside the end of text; a file that lacks these is broken.
    if missed and len(generation.stop_ids) <= 3:
        failures.append(f"llama.cpp does not end an answer at the tokens {missed}")
    elif missed:
        notes.append(
            f"llama.cpp has no key for more than three tokens that end an answer; left out: {missed}"
        )
    return failures, notes


def _wrong_ids(runtime: LlamaRuntime, tokenizer: Tokenizer, generation: GenerationSettings) -> Iterator[str]:
    got = runtime.special_ids()
    for name, expected in (("bos", generation.bos_id), ("eos", tokenizer.eos_id), ("pad", generation.pad_id)):
        if expected is not None and got[name] != expected:
            yield f"llama.cpp's {name} token is {got[name]}, the model's {expected}"
    if runtime.adds_bos() != tokenizer.adds_bos:
        yield f"llama.cpp {'adds' if runtime.adds_bos() else 'leaves out'} the begin token, unlike the tokenizer"


def added_tokens(tokenizer: Tokenizer) -> list[tuple[str, int]]:
    """(text, id) of the tokens that are no result of merging: special ones first, then the others that were added."""
    added = {token["content"]: int(token["id"]) for token in tokenizer.definition["added_tokens"]}
    pieces = read_pieces(tokenizer.sentencepiece) if tokenizer.sentencepiece is not None else ()
    found = {piece.text: index for index, piece in enumerate(pieces) if piece.kind == USER_DEFINED}
    found = {text: index for text, index in found.items() if tokenizer.vocab.get(text) == index}
    return list((tokenizer.special_tokens | added | found).items())
