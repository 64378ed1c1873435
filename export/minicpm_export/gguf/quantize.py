"""A GGUF in floats made smaller by llama.cpp's own quantiser, and what each tensor became."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from gguf import GGMLQuantizationType, GGUFReader, LlamaFileType

from minicpm_edge.errors import UserError
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
# The most bytes a weight that a file of the type has, embeddings and fallbacks to larger types included.
BYTES_PER_WEIGHT: Mapping[str, float] = {
    "F32": 4.0,
    "F16": 2.0,
    "BF16": 2.0,
    "Q8_0": 1.07,
    "Q6_K": 0.95,
    "Q5_K_M": 0.85,
    "Q4_K_M": 0.75,
    "Q4_0": 0.7,
}
SUPER_BLOCK = 256  # a K type packs that many weights of a row together


def quantize(source: Path, out: Path, quant: str) -> None:
    """Write ``source`` (a GGUF in floats) to ``out`` in the given type. Not atomic by itself.

    Raises:
        UserError: with llama.cpp's reason, where it cannot.
    """
    arguments = (source, out, int(QUANTISED_TYPES[quant]), num_threads(), MAX_BUFFER_BYTES)
    command = [sys.executable, "-m", "minicpm_export.gguf.quantize_process", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            _, errors = process.communicate()
        except BaseException:  # Ctrl-C, a termination: nobody is left to want its result
            process.kill()
            raise
    if process.returncode != 0:
        lines = errors.decode("utf-8", "replace").strip().splitlines()
        raise UserError(
            f"llama.cpp cannot quantise to {quant}: {lines[-1] if lines else f'status {process.returncode}'}"
        )


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
