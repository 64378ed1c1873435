"""From a Hugging Face folder to a certified ONNX folder that three runtimes load as it is.

``onnx/model.onnx`` (fp32) and ``onnx/model_quantized.onnx`` (int8) are where transformers.js looks, beside the
``config.json`` and tokenizer of a hub repository; ``genai_config.json`` points onnxruntime-genai to the same file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import onnx

from minicpm_edge.atomic import atomic_folder
from minicpm_edge.formats.checkpoint import open_hf_state_dict, read_config
from minicpm_edge.json_file import write_json
from minicpm_edge.model.config import ModelConfig
from minicpm_edge.text.tokenizer import PAD, Tokenizer
from minicpm_export.destination import rejected
from minicpm_export.hf import config as hf_config
from minicpm_export.onnx import graph as onnx_graph
from minicpm_export.onnx.weights import MAX_INLINE_BYTES, Initializers
from minicpm_export.request import Request
from minicpm_export.verify import certificate
from minicpm_export.verify.certificate import THRESHOLDS, Certificate, Check, Runtime, compare, hashes
from minicpm_export.verify.ort_runtime import OrtRuntime
from minicpm_export.verify.torch_runtime import TorchRuntime
from minicpm_export.verify.windows import HeldOut, held_out

# type → the file's name, as transformers.js derives it from its `dtype` option (fp32, q8), and bytes a weight
FILES: Mapping[str, tuple[str, float]] = {
    "F32": ("onnx/model.onnx", 4.0),
    "INT8": ("onnx/model_quantized.onnx", 1.125),
}


def export_onnx(request: Request, out: Path, quants: Sequence[str]) -> list[Certificate]:
    """Write the folder ``out`` with a graph in each of ``quants``, each with its certificate.

    Raises:
        UserError: for a model that has no ONNX form, and for an export that fails its certificate.
    """
    folder, config, tokenizer = request.folder, read_config(request.folder), Tokenizer.load(request.folder)
    text = held_out(tokenizer, config, text=request.text, run=request.run)
    made: list[Certificate] = []
    with atomic_folder(out) as temporary:
        (temporary / "onnx").mkdir()
        external = [quant for quant in quants if _write_graph(request, config, temporary, quant)]
        _write_settings(temporary, config, tokenizer, quants, external)
        reference = TorchRuntime(folder)
        for quant in quants:
            made.append(_certify(request, reference, temporary, quant, text))
            certificate.write(temporary, made[-1])
            request.show(made[-1])
        for one in made:
            if not one.passed:
                raise rejected(temporary, out, one)
    return made


def _write_graph(request: Request, config: ModelConfig, folder: Path, quant: str) -> bool:
    """Write one graph; returns whether its weights are in a file of their own."""
    name, bytes_per_weight = FILES[quant]
    tensors = open_hf_state_dict(request.folder)
    num_weights = sum(prod(tensor.shape) for tensor in tensors.values())
    external = num_weights * bytes_per_weight > MAX_INLINE_BYTES
    path = folder / name
    with Initializers(path.with_name(path.name + "_data") if external else None) as initializers:
        model = onnx_graph.build(config, tensors, initializers, int8=quant == "INT8", report=request.report)
    onnx.save(model, path)
    return external


def _write_settings(
    folder: Path, config: ModelConfig, tokenizer: Tokenizer, quants: Sequence[str], external: Sequence[str]
) -> None:
    """What the runtimes read beside the graph: model, generation and tokenizer settings."""
    tokenizer.save(folder)
    if tokenizer.chat_template:
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8", newline="\n")
    # Granite's name for the architecture: transformers.js has no entry for MiniCPM, and the function is the same.
    entries = hf_config.granite(config)
    entries["transformers.js_config"] = {
        "dtype": "q8" if "INT8" in quants else "fp32",
        "use_external_data_format": {Path(FILES[quant][0]).name: 1 for quant in external},
    }
    write_json(folder / "config.json", entries)
    write_json(folder / "generation_config.json", hf_config.generation(config, tokenizer))
    smallest = FILES["INT8" if "INT8" in quants else "F32"][0]
    write_json(folder / "genai_config.json", genai_config(config, tokenizer, smallest))


def genai_config(config: ModelConfig, tokenizer: Tokenizer, file: str) -> dict[str, object]:
    """onnxruntime-genai's description of the graph. Type ``decoder`` is its name for any of this form."""
    names = ("key", "value")
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": config.bos_token_id,
            "eos_token_id": sorted({config.eos_token_id, *tokenizer.stop_ids}),
            "pad_token_id": tokenizer.special_tokens.get(PAD, config.eos_token_id),
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
        "search": {"max_length": config.max_position_embeddings, "past_present_share_buffer": True},
    }


def _certify(request: Request, reference: Runtime, folder: Path, quant: str, text: HeldOut) -> Certificate:
    name = FILES[quant][0]
    checks = []
    for what, windows, through_cache in (
        (quant, text.windows, False),
        ("… through its cache", text.windows[:1], True),
    ):
        runtime = OrtRuntime(folder / name, through_cache=through_cache)
        measures = compare(reference, runtime, windows, request.report)
        checks.append(Check(what=what, runtime=runtime.name, measures=measures, thresholds=THRESHOLDS[quant]))
    own = [file for file in sorted((folder / "onnx").iterdir()) if file.name.startswith(Path(name).name)]
    settings = [
        file for file in sorted(folder.iterdir()) if file.is_file() and file.name != certificate.FILE_NAME
    ]
    return Certificate(
        file=name,
        quant=quant,
        num_bytes=sum(file.stat().st_size for file in own),
        sha256=hashes([*own, *settings], folder),
        model=request.name,
        model_sha256=request.model_sha256(),
        held_out=text.name,
        checks=tuple(checks),
    )
