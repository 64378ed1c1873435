"""A Hugging Face folder as a GGUF file in F32, F16 or BF16, written tensor by tensor.

Only one tensor is in memory at a time, and it is converted a few rows at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType
from numpy.typing import NDArray
from torch import Tensor

from minicpm_edge.errors import UserError
from minicpm_edge.formats.checkpoint import HFStateDict, LazyTensor, open_hf_state_dict, read_config
from minicpm_edge.formats.generation import read_generation
from minicpm_edge.model.config import ModelConfig
from minicpm_edge.text.tokenizer import Tokenizer
from minicpm_export.destination import MADE_BY_KEY
from minicpm_export.gguf.tensor_map import (
    ARCHITECTURE,
    TensorSpec,
    architecture_keys,
    frequency_factors,
    rotary_order,
    tensor_specs,
)
from minicpm_export.gguf.tokenizer import Entry, tokenizer_keys

CHUNK_BYTES = 2 << 20
ALIGNMENT = 32

# type of the file → how its matrices are stored
FLOAT_TYPES = {
    "F32": (LlamaFileType.ALL_F32, GGMLQuantizationType.F32, torch.float32),
    "F16": (LlamaFileType.MOSTLY_F16, GGMLQuantizationType.F16, torch.float16),
    "BF16": (LlamaFileType.MOSTLY_BF16, GGMLQuantizationType.BF16, torch.bfloat16),
}

Report = Callable[[str], None]


def write_gguf(folder: Path, out: Path, *, quant: str, name: str, report: Report) -> None:
    """Write ``folder``'s model to ``out`` (not atomic by itself).

    Args:
        quant: a key of :data:`FLOAT_TYPES`; vectors and routers stay F32 in all of them.
        name: the model's name in the file.
        report: told what is being written, for a progress line.

    Raises:
        UserError: for a folder that is not a model, and for weights that are not finite or do not fit the type.
    """
    if sys.byteorder == "big":
        raise UserError("GGUF files are written on little-endian machines only")
    config, tensors, tokenizer = read_config(folder), open_hf_state_dict(folder), Tokenizer.load(folder)
    tokenizer.check_fits(config.vocab_size, folder)
    if config.hidden_act != "silu":
        raise UserError(
            f"{folder}: hidden_act {config.hidden_act!r} has no GGUF form, llama.cpp computes silu only; "
            "--onnx and --hf export it"
        )
    specs = list(tensor_specs(config))
    factors = frequency_factors(config)
    writer = GGUFWriter(out, ARCHITECTURE)
    try:
        tokens = tokenizer_keys(tokenizer, config, read_generation(folder, tokenizer))
        _add_keys(writer, (*architecture_keys(config), *tokens), quant=quant, name=name)
        for spec in specs:
            _add_info(writer, spec, tensors, quant)
        for name_of_factors, row in factors.items():
            writer.add_tensor_info(name_of_factors, row.shape, row.dtype, row.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    with out.open("ab") as file:
        for index, spec in enumerate(specs):
            report(f"writing tensor {index + 1}/{len(specs)}  {spec.name}")
            _write(file, _pieces(spec, tensors, config, _torch_type(spec, quant)))
        for row in factors.values():
            _write(file, [row])


def _add_keys(writer: GGUFWriter, entries: Iterable[Entry], *, quant: str, name: str) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(FLOAT_TYPES[quant][0])
    writer.add_quantization_version(2)
    writer.add_key_value(MADE_BY_KEY, version("minicpm-edge"), GGUFValueType.STRING)
    for key, kind, value in entries:
        writer.add_key_value(key, value, kind)


def _add_info(writer: GGUFWriter, spec: TensorSpec, tensors: HFStateDict, quant: str) -> None:
    parts = [tensors[source].shape for source in spec.sources]
    shape = parts[0] if len(parts) == 1 else (len(parts), *parts[0])
    _, kind, dtype = FLOAT_TYPES["F32" if spec.keep_f32 else quant]
    writer.add_tensor_info(
        spec.name, shape, np.dtype(np.float32), prod(shape) * dtype.itemsize, raw_dtype=kind
    )


def _torch_type(spec: TensorSpec, quant: str) -> torch.dtype:
    return FLOAT_TYPES["F32" if spec.keep_f32 else quant][2]


def _pieces(
    spec: TensorSpec, tensors: HFStateDict, config: ModelConfig, dtype: torch.dtype
) -> Iterator[NDArray[np.generic]]:
    order = rotary_order(spec.heads, config.head_dim) if spec.heads else None
    for source in spec.sources:
        yield from _rows(tensors[source], order, dtype)


def _rows(
    source: LazyTensor, order: NDArray[np.int64] | None, dtype: torch.dtype
) -> Iterator[NDArray[np.generic]]:
    """The tensor's rows in the given order and dtype, a few megabytes at a time."""
    tensor = source.read()
    step = max(1, CHUNK_BYTES // (4 * prod(source.shape[1:])))
    for start in range(0, source.shape[0], step):
        rows = slice(start, start + step)
        block = tensor[rows] if order is None else tensor[torch.from_numpy(order[rows])]
        converted = block.to(dtype)
        _check_finite(block, converted, source)
        yield _as_numpy(converted)


def _check_finite(block: Tensor, converted: Tensor, source: LazyTensor) -> None:
    if bool(converted.isfinite().all()):
        return
    if bool(block.isfinite().all()):
        raise UserError(f"{source.name} holds values too large for F16; export BF16 or F32 instead")
    raise UserError(
        f"{source.file}: {source.name} holds values that are not finite; the checkpoint is broken"
    )


def _as_numpy(tensor: Tensor) -> NDArray[np.generic]:
    """The tensor's bytes as an array; numpy has no bfloat16, so its bits go as int16."""
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    array: NDArray[np.generic] = tensor.numpy()
    return array


def _write(file: BinaryIO, pieces: Iterator[NDArray[np.generic]] | list[NDArray[np.float32]]) -> None:
    """Write one tensor at the next multiple of the alignment; a file ends padded too, as llama.cpp expects."""
    file.write(bytes(-file.tell() % ALIGNMENT))
    for piece in pieces:
        file.write(piece.data)
    file.write(bytes(-file.tell() % ALIGNMENT))
