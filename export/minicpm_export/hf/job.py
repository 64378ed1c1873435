"""A Hugging Face folder with the published tensor names, equal to the model to the bit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from minicpm_edge.atomic import atomic_folder
from minicpm_edge.errors import UserError
from minicpm_edge.formats.checkpoint import open_hf_state_dict, read_config
from minicpm_edge.json_file import write_json
from minicpm_edge.model.config import ModelConfig
from minicpm_edge.text.tokenizer import Tokenizer
from minicpm_export.destination import rejected
from minicpm_export.hf import config as hf_config
from minicpm_export.request import Request
from minicpm_export.verify import certificate
from minicpm_export.verify.certificate import THRESHOLDS, Certificate, Check, compare, hashes
from minicpm_export.verify.torch_runtime import TorchRuntime
from minicpm_export.verify.windows import held_out


def export_huggingface(request: Request, out: Path, *, architecture: str = "minicpm") -> Certificate:
    """Write the folder ``out`` with its certificate, which also says that every tensor is the same to the bit.

    ``architecture`` is ``minicpm`` as published, or ``granite``: the same tensors under the name by which
    `transformers` and many other tools compute the same function (dense models only).

    Raises:
        UserError: for a model that cannot be exported, and for a folder that fails its certificate.
    """
    folder, config, tokenizer = request.folder, read_config(request.folder), Tokenizer.load(request.folder)
    tensors = open_hf_state_dict(folder)
    if architecture == "granite" and config.num_experts:
        raise UserError(
            "a mixture of experts has no Granite form with these tensor names; leave --granite out"
        )
    text = held_out(tokenizer, config, text=request.text, run=request.run)
    with atomic_folder(out) as temporary:
        request.report("copying weights")
        index = folder / "model.safetensors.index.json"
        for file in {tensor.file for tensor in tensors.values()} | ({index} if index.is_file() else set()):
            shutil.copyfile(file, temporary / file.name)
        tokenizer.save(temporary)
        write_json(temporary / "config.json", _config(config, folder, architecture))
        write_json(temporary / "generation_config.json", hf_config.generation(config, tokenizer))
        measures = compare(TorchRuntime(folder), TorchRuntime(temporary), text.windows, request.report)
        # Granite's own keys go through a square root and back: the last bit of a scale may differ.
        limits = THRESHOLDS["exact" if architecture == "minicpm" else "F32"]
        check = Check(what="HF", runtime=f"torch {torch.__version__}", measures=measures, thresholds=limits)
        made = Certificate(
            file="model.safetensors",
            quant="as stored",
            num_bytes=sum(file.stat().st_size for file in temporary.iterdir()),
            sha256=hashes(sorted(temporary.iterdir()), temporary),
            model=request.name,
            model_sha256=request.model_sha256(),
            held_out=text.name,
            checks=(check,),
            other_failures=tuple(_differing(folder, temporary)),
        )
        certificate.write(temporary, made)
        request.show(made)
        if not made.passed:
            raise rejected(temporary, out, made)
    return made


def _config(config: ModelConfig, folder: Path, architecture: str) -> dict[str, object]:
    entries = hf_config.granite(config) if architecture == "granite" else config.to_dict()
    stored = next(iter(open_hf_state_dict(folder).values())).dtype
    return {**entries, "torch_dtype": str(stored).removeprefix("torch.")}


def _differing(folder: Path, copy: Path) -> Iterator[str]:
    """Tensors of the copy that are not the original's to the bit."""
    originals, copies = open_hf_state_dict(folder), open_hf_state_dict(copy)
    for name, original in originals.items():
        if name not in copies or not torch.equal(_bits(original.read()), _bits(copies[name].read())):
            yield f"the tensor {name} differs"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """As integers: a NaN equals itself, and 0 does not equal -0."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
