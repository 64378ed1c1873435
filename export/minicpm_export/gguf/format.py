"""One GGUF for llama.cpp: floats as they are, or quantised by llama.cpp from a GGUF in F32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import ClassVar

import torch

from minicpm_edge.model.config import ModelConfig
from minicpm_export.format import ExportedFile, ReadBack
from minicpm_export.gguf.content_check import compare_content, describe
from minicpm_export.gguf.quantize import BYTES_PER_WEIGHT, fallbacks, quantize, tensor_types
from minicpm_export.gguf.runtime import LlamaRuntime
from minicpm_export.gguf.tokenizer_check import compare_tokenizers
from minicpm_export.gguf.writer import FLOAT_TYPES, write_gguf
from minicpm_export.source import Source
from minicpm_export.verify.compare import THRESHOLDS

UNQUANTISED = "unquantised.gguf"
TOKENIZER_BYTES = 16 << 20
FLOAT_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True, kw_only=True)
class GGUF:
    """A file with weights of type ``quant``: F32, F16, BF16, or one of llama.cpp's quantised types."""

    quant: str
    is_folder: ClassVar[bool] = False

    def file_name(self, model: str) -> str:
        return f"{model}-{self.quant}.gguf"

    def disk_bytes(self, source: Source) -> int:
        weights = sum(prod(tensor.shape) for tensor in source.state_dict().values())
        intermediate = 0.0 if self.quant in FLOAT_TYPES else BYTES_PER_WEIGHT[_lossless_type(source)]
        return int(weights * (BYTES_PER_WEIGHT[self.quant] + intermediate)) + TOKENIZER_BYTES

    def write(self, source: Source, out: Path, scratch: Path, report: Callable[[str], None]) -> None:
        if self.quant in FLOAT_TYPES:
            write_gguf(source.folder, out, quant=self.quant, name=source.name, report=report)
            return
        full = scratch / UNQUANTISED
        write_gguf(source.folder, full, quant=_lossless_type(source), name=source.name, report=report)
        report(f"quantising to {self.quant}")
        quantize(full, out, self.quant)

    def exported(self, source: Source, out: Path, scratch: Path) -> Sequence[ExportedFile]:
        cache_limits = "F16" if self.quant == "F32" else self.quant
        read_backs = [
            _read_back(self.quant, out, self.quant),
            _read_back(
                "… with llama.cpp's F16 cache", out, cache_limits, first_window_only=True, defaults=True
            ),
        ]
        if self.quant not in FLOAT_TYPES:  # with tight limits: a wrong map cannot hide behind rounding
            full = scratch / UNQUANTISED
            exact = f"{_lossless_type(source)} exact"
            read_backs.append(_read_back("before quantising", full, exact, first_window_only=True))
        failures, notes = compare_tokenizers(out, source.tokenizer, source.generation)
        return [
            ExportedFile(
                path=out,
                quant=self.quant,
                files=[out],
                read_backs=read_backs,
                failures=[*describe(compare_content(out, source)), *failures],
                notes=[*notes, *_context_notes(source.config), *fallbacks(tensor_types(out), self.quant)],
            )
        ]


def _lossless_type(source: Source) -> str:
    """The smallest type that holds the source's weights as they are: what is quantised, and verified before."""
    dtypes = {tensor.dtype for tensor in source.state_dict().values()}
    return FLOAT_NAMES[dtypes.pop()] if len(dtypes) == 1 else "F32"


def _context_notes(config: ModelConfig) -> Iterator[str]:
    if config.rope_scaling is not None and config.rope_scaling.kind == "dynamic":
        yield (
            f"dynamic rope scaling begins beyond {config.max_position_embeddings} tokens and has no form in GGUF: "
            "up to there the file is the model"
        )


def _read_back(
    what: str, file: Path, limits: str, *, first_window_only: bool = False, defaults: bool = False
) -> ReadBack:
    return ReadBack(
        what=what,
        thresholds=THRESHOLDS[limits],
        open=lambda length: LlamaRuntime(file, context_length=length, defaults=defaults),
        first_window_only=first_window_only,
    )
