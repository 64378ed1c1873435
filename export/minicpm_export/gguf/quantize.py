"""A GGUF in F32 made smaller by llama.cpp's own quantiser, and what each tensor became."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import llama_cpp
from gguf import GGMLQuantizationType, GGUFReader, LlamaFileType

from minicpm_edge.errors import UserError
from minicpm_export.gguf.llama_log import quiet_log
from minicpm_export.threads import num_threads

QUANTISED_TYPES: Mapping[str, LlamaFileType] = {
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q6_K": LlamaFileType.MOSTLY_Q6_K,
    "Q5_K_M": LlamaFileType.MOSTLY_Q5_K_M,
    "Q4_K_M": LlamaFileType.MOSTLY_Q4_K_M,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
}
MAX_BUFFER_BYTES = 256 << 20  # llama.cpp's default of 8 GB would hold a whole tensor at once
# The types that llama.cpp mixes on purpose under each name; F32 (vectors, routers) belongs to all of them.
MIXED_TYPES: Mapping[str, frozenset[str]] = {
    "Q8_0": frozenset({"Q8_0"}),
    "Q6_K": frozenset({"Q6_K"}),
    "Q5_K_M": frozenset({"Q5_K", "Q6_K"}),
    "Q4_K_M": frozenset({"Q4_K", "Q6_K"}),
    "Q4_0": frozenset({"Q4_0", "Q6_K"}),
}
SUPER_BLOCK = 256  # a K type packs that many weights of a row together


def quantize(source: Path, out: Path, quant: str) -> None:
    """Write ``source`` (a GGUF in F32) to ``out`` in the given type. Not atomic by itself."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = int(QUANTISED_TYPES[quant])
    params.nthread = num_threads()
    if hasattr(params, "max_buf_size"):  # since llama-cpp-python 0.3.36
        params.max_buf_size = MAX_BUFFER_BYTES
    errors = quiet_log()
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), params)
    if status != 0:
        raise UserError(f"llama.cpp cannot quantise to {quant}: {'; '.join(errors) or f'status {status}'}")


def tensor_types(path: Path) -> dict[str, tuple[str, int]]:
    """Of every tensor of a GGUF: its type's name and the length of its rows, read back from the file."""
    reader = GGUFReader(path)
    return {
        tensor.name: (GGMLQuantizationType(tensor.tensor_type).name, int(tensor.shape[0]))
        for tensor in reader.tensors
    }


def fallbacks(types: Mapping[str, tuple[str, int]], quant: str) -> list[str]:
    """Which types stand in for the asked one where rows do not divide into its blocks, in plain words.

    Deliberate mixtures (the more precise types that ``Q4_K_M`` gives some tensors, 8-expert models' attention) are
    not fallbacks. One line for each pair of a type and a row length; empty when every tensor got what was asked.
    """
    if quant not in MIXED_TYPES:
        return []
    groups = Counter(
        (kind, row)
        for kind, row in types.values()
        if kind != "F32" and kind not in MIXED_TYPES[quant] and row % SUPER_BLOCK
    )
    return [
        f"{kind} instead for {count} of {len(types)} tensors: rows of {row} do not divide into {quant}'s blocks"
        for (kind, row), count in groups.items()
    ]
