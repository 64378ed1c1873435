"""An ONNX folder that three runtimes load as it is.

``onnx/model.onnx`` (fp32) and ``onnx/model_quantized.onnx`` (int8) are where transformers.js looks, beside the
``config.json`` and tokenizer of a hub repository; ``genai_config.json`` points onnxruntime-genai to the same file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import ClassVar

import onnx

from minicpm_edge.formats.generation import GENERATION_CONFIG, SAMPLING, GenerationSettings
from minicpm_edge.formats.resolve import check_onnx_path
from minicpm_edge.json_file import read_json, write_json
from minicpm_edge.model.config import ModelConfig
from minicpm_export.folder_check import wrong_settings
from minicpm_export.format import ExportedFile, ReadBack
from minicpm_export.hf.config import granite_config
from minicpm_export.onnx.graph import build
from minicpm_export.onnx.runtime import OrtRuntime
from minicpm_export.onnx.weights import MAX_INLINE_BYTES, Initializers
from minicpm_export.source import Source
from minicpm_export.verify.compare import THRESHOLDS

# type → the file's name, as transformers.js derives it from its `dtype` option (fp32, q8), and bytes a weight
FILES: Mapping[str, tuple[str, float]] = {
    "F32": ("onnx/model.onnx", 4.0),
    "INT8": ("onnx/model_quantized.onnx", 1.125),
}


SETTINGS_BYTES = 64 << 20  # a tokenizer of a large vocabulary, in both of its forms


@dataclass(frozen=True, kw_only=True)
class ONNX:
    """A folder with a graph of each type in ``quants`` (F32, INT8)."""

    quants: Sequence[str] = tuple(FILES)
    is_folder: ClassVar[bool] = True

    def file_name(self, model: str) -> str:
        return f"{model}-onnx"

    def disk_bytes(self, source: Source) -> int:
        weights = sum(prod(tensor.shape) for tensor in source.state_dict().values())
        return int(weights * sum(FILES[quant][1] for quant in self.quants)) + SETTINGS_BYTES

    def write(self, source: Source, out: Path, scratch: Path, report: Callable[[str], None]) -> None:
        check_onnx_path(out)
        (out / "onnx").mkdir()
        external = [quant for quant in self.quants if _write_graph(source, out, quant, report)]
        _write_settings(out, source, self.quants, external)

    def exported(self, source: Source, out: Path, scratch: Path) -> Sequence[ExportedFile]:
        failures = [*wrong_settings(out, source), *_wrong_genai_settings(out, source)]
        return [_exported(out, quant, failures) for quant in self.quants]


def _wrong_genai_settings(folder: Path, source: Source) -> Iterator[str]:
    """A line for each setting of genai_config.json that is not the source's."""
    genai = read_json(folder / "genai_config.json")
    model, search = genai["model"], genai["search"]
    pairs = (
        ("begin of text", model["bos_token_id"], source.generation.bos_id),
        ("ends of an answer", set(model["eos_token_id"]), set(source.generation.stop_ids)),
        ("context length", model["context_length"], source.config.max_position_embeddings),
        (
            "sampling",
            {name: search.get(name) for name in SAMPLING if name in search},
            source.generation.sampling,
        ),
    )
    for name, got, expected in pairs:
        if got != expected:
            yield f"genai_config.json, {name}: {got}, the model's is {expected}"


def _exported(folder: Path, quant: str, failures: Sequence[str]) -> ExportedFile:
    path = folder / FILES[quant][0]

    def read_back(what: str, *, through_cache: bool) -> ReadBack:
        return ReadBack(
            what=what,
            thresholds=THRESHOLDS[quant],
            open=lambda length: nullcontext(OrtRuntime(path, through_cache=through_cache)),
            first_window_only=through_cache,
        )

    return ExportedFile(
        path=path,
        quant=quant,
        files=[file for file in sorted(path.parent.iterdir()) if file.name.startswith(path.name)],
        shared_files=[file for file in sorted(folder.iterdir()) if file.is_file()],
        read_backs=[
            read_back(quant, through_cache=False),
            read_back("… through its cache", through_cache=True),
        ],
        failures=failures,
    )


def _write_graph(source: Source, folder: Path, quant: str, report: Callable[[str], None]) -> bool:
    """Write one graph; returns whether its weights are in a file of their own."""
    name, bytes_per_weight = FILES[quant]
    tensors = source.state_dict()
    num_weights = sum(prod(tensor.shape) for tensor in tensors.values())
    external = num_weights * bytes_per_weight > MAX_INLINE_BYTES
    path = folder / name
    with Initializers(path.with_name(path.name + "_data") if external else None) as initializers:
        model = build(source.config, tensors, initializers, int8=quant == "INT8", report=report)
    onnx.save(model, path)
    return external


def _write_settings(folder: Path, source: Source, quants: Sequence[str], external: Sequence[str]) -> None:
    """What the runtimes read beside the graph: model, generation and tokenizer settings."""
    config, tokenizer = source.config, source.tokenizer
    tokenizer.save(folder)
    if tokenizer.chat_template:
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8", newline="\n")
    # Granite's name for the architecture: transformers.js has no entry for MiniCPM, and the function is the same.
    # It only looks for sizes there.
    entries = {**config.to_dict(), "architectures": ["GraniteForCausalLM"], "model_type": "granite"}
    if config.hidden_act == "silu":
        entries = granite_config(source)
    entries["transformers.js_config"] = {
        "dtype": "q8" if "INT8" in quants else "fp32",
        "use_external_data_format": {Path(FILES[quant][0]).name: 1 for quant in external},
    }
    write_json(folder / "config.json", entries)
    write_json(folder / GENERATION_CONFIG, source.generation.to_dict())
    smallest = FILES["INT8" if "INT8" in quants else "F32"][0]
    write_json(folder / "genai_config.json", genai_config(config, source.generation, smallest))


def genai_config(config: ModelConfig, generation: GenerationSettings, file: str) -> dict[str, object]:
    """onnxruntime-genai's description of the graph. Type ``decoder`` is its name for any of this form."""
    names = ("key", "value")
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": generation.bos_id,
            "eos_token_id": list(generation.stop_ids),
            "pad_token_id": generation.stop_ids[0] if generation.pad_id is None else generation.pad_id,
            "context_length": config.max_position_embeddings,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": file,
                "head_size": config.head_dim,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "num_key_value_heads": config.num_key_value_heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    **{f"past_{name}_names": f"past_key_values.%d.{name}" for name in names},
                },
                "outputs": {
                    "logits": "logits",
                    **{f"present_{name}_names": f"present.%d.{name}" for name in names},
                },
            },
        },
        "search": {
            "max_length": config.max_position_embeddings,
            "past_present_share_buffer": True,
            **generation.sampling,
        },
    }
