"""A Hugging Face folder with the published tensor names, equal to the model to the bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from minicpm_edge.formats.checkpoint import LazyTensor, open_hf_state_dict, write_weights
from minicpm_edge.formats.generation import GENERATION_CONFIG
from minicpm_edge.formats.resolve import WEIGHT_FILES
from minicpm_edge.json_file import write_json
from minicpm_export.folder_check import wrong_settings
from minicpm_export.format import ExportedFile, ReadBack
from minicpm_export.hf.config import CONFIGS
from minicpm_export.hf.fold import fold_scales
from minicpm_export.source import Source
from minicpm_export.verify.compare import THRESHOLDS
from minicpm_export.verify.torch_runtime import TorchRuntime

SETTINGS_BYTES = 64 << 20  # a tokenizer of a large vocabulary, in both of its forms
SINGLE, INDEX = WEIGHT_FILES


@dataclass(frozen=True, kw_only=True)
class HuggingFace:
    """A folder for Hugging Face's tools; unless scales are folded, its weights are compared to the bit as well.

    ``architecture`` is ``own``, as the source has it, or the name under which it is written: ``minicpm`` and
    ``granite`` (the same tensors; `transformers` has Granite built in), or ``llama`` (scales multiplied into the
    weights, for every tool that runs a Llama).
    """

    architecture: str = "own"
    is_folder: ClassVar[bool] = True

    def file_name(self, model: str) -> str:
        return f"{model}-hf"

    def disk_bytes(self, source: Source) -> int:
        stored = sum(tensor.num_bytes for tensor in source.state_dict().values())
        # A folded file has some of its tensors in F32.
        return (2 if self.architecture == "llama" else 1) * stored + SETTINGS_BYTES

    def write(self, source: Source, out: Path, scratch: Path, report: Callable[[str], None]) -> None:
        entries, tensors = CONFIGS[self.architecture](source), source.state_dict()
        report("copying weights")
        if self.architecture == "llama":
            tied_copy = {"lm_head.weight"} if source.config.tie_word_embeddings else set()
            kept = {name: tensor for name, tensor in tensors.items() if name not in tied_copy}
            write_weights(out, fold_scales(source.config, kept))
            entries["torch_dtype"] = "float32"
        else:
            _copy_weights(source.folder, tensors, out)
            entries["torch_dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        if "auto_map" in entries:  # the source's own code, which it names there
            for file in source.folder.glob("*.py"):
                shutil.copyfile(file, out / file.name)
        source.tokenizer.save(out)
        ends = source.generation.stop_ids
        entries["eos_token_id"] = ends[0] if len(ends) == 1 else list(ends)
        write_json(out / "config.json", entries)
        write_json(out / GENERATION_CONFIG, source.generation.to_dict())

    def exported(self, source: Source, out: Path, scratch: Path) -> Sequence[ExportedFile]:
        read_back = ReadBack(
            what="HF",
            # Granite's own keys go through a square root and back: the last bit of a scale may differ.
            thresholds=THRESHOLDS["exact" if self.architecture in ("own", "minicpm") else "F32"],
            open=lambda length: nullcontext(TorchRuntime(out)),
        )
        folded = self.architecture == "llama"
        return [
            ExportedFile(
                path=next(out / name for name in WEIGHT_FILES if (out / name).is_file()),
                quant="F32 where scaled" if folded else "as stored",
                files=sorted(out.iterdir()),
                read_backs=[read_back],
                failures=[
                    *wrong_settings(out, source),
                    *([] if folded else _differing_tensors(source.folder, out)),
                ],
            )
        ]


def _copy_weights(folder: Path, tensors: Mapping[str, LazyTensor], out: Path) -> None:
    files = sorted({tensor.file for tensor in tensors.values()})
    if files != [folder / SINGLE]:
        files.append(folder / INDEX)
    for file in files:
        shutil.copyfile(file, out / file.name)


def _differing_tensors(folder: Path, copy: Path) -> Iterator[str]:
    """A line for each tensor of the copy that is not the original's to the bit."""
    originals, copies = open_hf_state_dict(folder), open_hf_state_dict(copy)
    for name, original in originals.items():
        if name not in copies or not torch.equal(_bits(original.read()), _bits(copies[name].read())):
            yield f"the tensor {name} differs"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """As integers: a NaN equals itself, and 0 does not equal -0."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
