"""A checkpoint is a Hugging Face folder with a manifest of SHA-256.

Nothing here ever reads or writes a pickle. Folders are written through :mod:`minicpm_edge.atomic`.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minicpm_edge.atomic import atomic_folder
from minicpm_edge.errors import UserError
from minicpm_edge.formats.weight_map import WeightMapping, weight_mappings
from minicpm_edge.json_file import read_json, write_json
from minicpm_edge.lfs import refuse_pointer
from minicpm_edge.model.config import ModelConfig
from minicpm_edge.model.transformer import MiniCPM

MANIFEST = "manifest.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json")
MAX_SHARD_BYTES = 4 << 30
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """A tensor of a Hugging Face folder, still on the disk: its shape and dtype are known, ``read()`` fetches it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor, on the CPU, in its stored dtype."""
        with safe_open(self.file, framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(self.name)
        return tensor


class TensorSource(Protocol):
    """A tensor that is made only when it is written."""

    @property
    def num_bytes(self) -> int:
        """Its size."""
        ...

    def read(self) -> Tensor:
        """The tensor, on the CPU, contiguous, sharing its memory with no other."""
        ...


class HFStateDict(Mapping[str, LazyTensor]):
    """The tensors of a Hugging Face folder, one file or sharded, by HF name; none is read before it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._tensors: dict[str, LazyTensor] = {}
        for file in _weight_files(folder):
            refuse_pointer(file)
            try:
                self._open(file)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: not a readable safetensors file ({error})") from None

    def _open(self, file: Path) -> None:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                part = tensors.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise UserError(
                        f"{file}: tensor {name} is {part.get_dtype()}; only F32, F16, BF16 are read"
                    )
                self._tensors[name] = LazyTensor(
                    file=file, name=name, shape=tuple(part.get_shape()), dtype=DTYPES[part.get_dtype()]
                )

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        if any(Path(name).name != name for name in names):
            raise UserError(f"{index}: a shard's name leaves the folder")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise UserError(f"{folder}: the shard {missing[0] if missing else '(none listed)'} is missing")
        return [folder / name for name in names]
    if list(folder.glob("pytorch_model*.bin")):
        raise UserError(f"{folder}: only pickled weights here; convert them to safetensors first")
    raise UserError(f"{folder}: no model.safetensors here")


def read_config(folder: Path) -> ModelConfig:
    """The model config of a Hugging Face folder.

    Raises:
        UserError: where config.json is missing, broken, or of a model that this decoder does not compute.
    """
    try:
        return ModelConfig.from_dict(read_json(folder / "config.json"))
    except UserError as error:
        raise UserError(
            f"{folder}: {error}" if not str(error).startswith(str(folder)) else str(error)
        ) from None


def open_hf_state_dict(folder: Path) -> HFStateDict:
    """The folder's tensors, checked against its config: every one present, in shape, and none unknown.

    Raises:
        UserError: naming the folder and the tensor that is missing, of another shape, or unknown.
    """
    config, tensors = read_config(folder), HFStateDict(folder)
    expected: dict[str, tuple[int, ...]] = {}
    for weight in weight_mappings(config):
        for names in weight.hf_names:
            for name, rows in zip(names, weight.rows, strict=True):
                expected[name] = (rows,) if weight.columns is None else (rows, weight.columns)
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(f"{folder}: the tensor {name} is missing")
        if tensors[name].shape != shape:
            raise UserError(f"{folder}: {name} has shape {tensors[name].shape}, config.json asks for {shape}")
    tied_copy = {"lm_head.weight"} if config.tie_word_embeddings else set()
    unknown = [name for name in tensors if name not in expected and name not in tied_copy]
    if unknown := [name for name in unknown if not name.endswith("rotary_emb.inv_freq")]:
        raise UserError(f"{folder}: the tensor {unknown[0]} is not one this architecture knows")
    return tensors


def load_checkpoint(
    folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> MiniCPM:
    """The model of a Hugging Face folder (MiniCPM, Llama family, Granite), on a device, in evaluation mode.

    ``dtype`` defaults to float32.

    Raises:
        UserError: where files are missing, unreadable or do not fit the config.
    """
    config, tensors = read_config(folder), open_hf_state_dict(folder)
    dtype = dtype or torch.float32
    with torch.device("meta"):
        model = MiniCPM(config)
    model = model.to_empty(device=device).to(dtype)
    model.reset_buffers()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for weight in weight_mappings(config):
            _fill(parameters[weight.name], weight, tensors)
    return model.eval()


def _fill(parameter: Tensor, weight: WeightMapping, tensors: HFStateDict) -> None:
    for expert, names in enumerate(weight.hf_names):
        target = parameter[expert] if weight.stacked else parameter
        for name, block in zip(names, target.split(weight.rows), strict=True):
            block.copy_(tensors[name].read())


def hf_state_dict(model: MiniCPM) -> dict[str, Tensor]:
    """Views of the model's parameters under their Hugging Face names, in file order."""
    parameters = dict(model.named_parameters())
    state: dict[str, Tensor] = {}
    for weight in weight_mappings(model.config):
        for expert, names in enumerate(weight.hf_names):
            source = parameters[weight.name].detach()
            source = source[expert] if weight.stacked else source
            state.update(zip(names, source.split(weight.rows), strict=True))
    return state


def write_model(folder: Path, model: MiniCPM, *, tokenizer: Path | None = None) -> None:
    """Write config, weights and tokenizer files into an existing folder (not atomic by itself)."""
    config = model.config.to_dict()
    state = hf_state_dict(model)
    config["torch_dtype"] = str(next(iter(state.values())).dtype).removeprefix("torch.")
    write_json(folder / "config.json", config)
    generation = {"bos_token_id": model.config.bos_token_id, "eos_token_id": model.config.eos_token_id}
    write_json(folder / "generation_config.json", generation)
    write_weights(folder, {name: _InMemory(tensor) for name, tensor in state.items()})
    if tokenizer is not None:
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, folder / name)


@dataclass(frozen=True)
class _InMemory:
    tensor: Tensor

    @property
    def num_bytes(self) -> int:
        return self.tensor.nbytes

    def read(self) -> Tensor:
        # Merged weights share storage between HF names, which the format refuses.
        return self.tensor.to("cpu", copy=True).contiguous()


def write_weights(folder: Path, state: Mapping[str, TensorSource]) -> None:
    """One ``model.safetensors``, or shards of at most 4 GB with an index, as the Hugging Face hub has them.

    One shard is in memory at a time. Not atomic by itself.
    """
    shards: list[dict[str, TensorSource]] = [{}]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.num_bytes > MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.num_bytes
    count = len(shards)
    files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    if count == 1:
        files = ["model.safetensors"]
    for file, shard in zip(files, shards, strict=True):
        write_tensors({name: tensor.read() for name, tensor in shard.items()}, folder / file)
    if count > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(tensor.num_bytes for tensor in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def save_checkpoint(
    folder: Path,
    model: MiniCPM,
    *,
    tokenizer: Path | None = None,
    extra_files: Callable[[Path], None] | None = None,
) -> None:
    """Write a whole checkpoint atomically: the model, what ``extra_files`` adds, then the manifest.

    Raises:
        OSError: where the disk is full or refuses; ``folder`` is then as it was.
    """
    with atomic_folder(folder) as temporary:
        write_model(temporary, model, tokenizer=tokenizer)
        if extra_files is not None:
            extra_files(temporary)
        write_manifest(temporary)


def write_manifest(folder: Path) -> None:
    """Record size and SHA-256 of every file of the folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)
    entries = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in files
    }
    write_json(folder / MANIFEST, {"files": entries})


def verify_manifest(folder: Path) -> None:
    """Compare every file with the manifest; a folder without one is not checked.

    Raises:
        UserError: naming the first file that is missing or not the one written.
    """
    if not (folder / MANIFEST).is_file():
        return
    for name, entry in read_json(folder / MANIFEST).get("files", {}).items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{folder}: {name} is missing; take another checkpoint of the run")
        if file.stat().st_size != entry["bytes"] or sha256(file) != entry["sha256"]:
            raise UserError(
                f"{folder}: {name} is damaged (SHA-256 differs); take another checkpoint of the run"
            )


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a safetensors file.

    Raises:
        OSError: where the disk is full or refuses, as Python's own writing does.
    """
    try:
        save_file(dict(tensors), file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"cannot write {file}: {error}") from None
