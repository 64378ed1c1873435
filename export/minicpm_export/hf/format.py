"""A Hugging Face folder with the published tensor names, equal to the model to the bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from minicpm_edge.errors import UserError
from minicpm_edge.formats.checkpoint import open_hf_state_dict
from minicpm_edge.formats.generation import GENERATION_CONFIG
from minicpm_edge.formats.resolve import WEIGHT_FILES
from minicpm_edge.json_file import write_json
from minicpm_export.format import ExportedFile, ReadBack
from minicpm_export.hf.config import granite_config
from minicpm_export.source import Source
from minicpm_export.verify.compare import THRESHOLDS
from minicpm_export.verify.torch_runtime import TorchRuntime

SINGLE, INDEX = WEIGHT_FILES


@dataclass(frozen=True, kw_only=True)
class HuggingFace:
    """A folder for Hugging Face's tools; its weights are compared to the bit as well.

    ``architecture`` is ``minicpm`` as published, or ``granite``: the same tensors under the name by which
    `transformers` and many other tools compute the same function (dense models only).
    """

    architecture: str = "minicpm"
    is_folder: ClassVar[bool] = True

    def file_name(self, model: str) -> str:
        return f"{model}-hf"

    def write(self, source: Source, out: Path, scratch: Path, report: Callable[[str], None]) -> None:
        if self.architecture == "granite" and source.config.num_experts:
            raise UserError(
                "a mixture of experts has no Granite form with these tensor names; leave --architecture granite out"
            )
        if self.architecture == "granite" and source.config.hidden_act != "silu":
            raise UserError(
                f"hidden_act {source.config.hidden_act!r} has no Granite form; leave --architecture granite out"
            )
        tensors = source.state_dict()
        report("copying weights")
        files = sorted({tensor.file for tensor in tensors.values()})
        if files != [source.folder / SINGLE]:
            files.append(source.folder / INDEX)
        for file in files:
            shutil.copyfile(file, out / file.name)
        source.tokenizer.save(out)
        granite = self.architecture == "granite"
        entries = granite_config(source.config) if granite else source.config.to_dict()
        entries["eos_token_id"] = ends[0] if len(ends := source.generation.stop_ids) == 1 else list(ends)
        stored = next(iter(tensors.values())).dtype
        write_json(out / "config.json", {**entries, "torch_dtype": str(stored).removeprefix("torch.")})
        write_json(out / GENERATION_CONFIG, source.generation.to_dict())

    def exported(self, source: Source, out: Path, scratch: Path) -> Sequence[ExportedFile]:
        read_back = ReadBack(
            what="HF",
            # Granite's own keys go through a square root and back: the last bit of a scale may differ.
            thresholds=THRESHOLDS["exact" if self.architecture == "minicpm" else "F32"],
            open=lambda length: nullcontext(TorchRuntime(out)),
        )
        return [
            ExportedFile(
                path=next(out / name for name in WEIGHT_FILES if (out / name).is_file()),
                quant="as stored",
                files=sorted(out.iterdir()),
                read_backs=[read_back],
                failures=list(_differing_tensors(source.folder, out)),
            )
        ]


def _differing_tensors(folder: Path, copy: Path) -> Iterator[str]:
    """A line for each tensor of the copy that is not the original's to the bit."""
    originals, copies = open_hf_state_dict(folder), open_hf_state_dict(copy)
    for name, original in originals.items():
        if name not in copies or not torch.equal(_bits(original.read()), _bits(copies[name].read())):
            yield f"the tensor {name} differs"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """As integers: a NaN equals itself, and 0 does not equal -0."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
