"""A verification that is worth something: a GGUF that is not the model is caught, whatever its type."""

import json

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from minicpm_export.gguf import tensor_map, writer
from minicpm_export.gguf.format import GGUF
from minicpm_export.gguf.quantize import quantize
from minicpm_export.gguf.tokenizer import tokenizer_keys
from minicpm_export.pipeline import export
from minicpm_export.source import Source
from minicpm_export.verify import certificate

from minicpm_edge.errors import UserError
from minicpm_edge.formats.checkpoint import load_checkpoint, save_checkpoint, sha256

pytestmark = pytest.mark.slow  # each writes, reads back and compares a whole export


def without(key):
    """The key table without one key: a reader takes its own default."""
    return tuple(row for row in tensor_map.KEYS if row[0] != key)


def with_value(key, value):
    return tuple((name, kind, value if name == key else read) for name, kind, read in tensor_map.KEYS)


def wrong_residual_scale(config):
    return config.residual_scale * 1.02


def inverted_logit_scale(config):
    return config.logit_scale  # multiplies where the graph divides: the field's best-known mistake


FAULTS = {
    "logit_scale left out": ("KEYS", without("logit_scale")),
    "embedding_scale left out": ("KEYS", without("embedding_scale")),
    "residual_scale left out": ("KEYS", without("residual_scale")),
    "residual scale 2 % off": ("KEYS", with_value("residual_scale", wrong_residual_scale)),
    "logit scale inverted": ("KEYS", with_value("logit_scale", inverted_logit_scale)),
    "norm epsilon of another model": (
        "KEYS",
        with_value("attention.layer_norm_rms_epsilon", lambda config: 1e-2),
    ),
    "rope base of another model": ("KEYS", with_value("rope.freq_base", lambda config: 5e5)),
    "rotary rows not reordered": ("rotary_order", lambda heads, size: np.arange(heads * size)),
    "gate and up exchanged": (
        "_DENSE",
        (
            ("ffn_gate", "mlp.up_proj", None, False),
            ("ffn_up", "mlp.gate_proj", None, False),
            ("ffn_down", "mlp.down_proj", None, False),
        ),
    ),
}


@pytest.fixture(scope="module")
def bfloat16_model(make_model, tmp_path_factory):
    """The small model as published weights are stored: what is quantised is then a GGUF in BF16."""
    folder = tmp_path_factory.mktemp("bfloat16") / "m"
    save_checkpoint(folder, load_checkpoint(make_model(), dtype=torch.bfloat16), tokenizer=make_model())
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_map_of_16_bit_weights_is_caught(fault, bfloat16_model, tmp_path, monkeypatch):
    """What is compared before quantising has the runtime's rounding to 16 bits in it, and no more."""
    name, value = FAULTS[fault]
    monkeypatch.setattr(writer if name == "rotary_order" else tensor_map, name, value)
    with pytest.raises(UserError, match=r"before quantising: mean KL|the key minicpm"):
        export(GGUF(quant="Q4_0"), Source(folder=bfloat16_model, name="m"), tmp_path / "m.gguf")


def test_quantising_16_bit_weights_gives_the_same_bytes(bfloat16_model, tmp_path):
    """From a GGUF in BF16 as from one in F32, which takes twice the room."""
    source = Source(folder=bfloat16_model, name="m")
    [made] = export(GGUF(quant="Q4_K_M"), source, tmp_path / "m.gguf")
    before = next(check for check in made.checks if check.what == "before quantising")
    assert before.measures.mean_kl < 1e-4
    writer.write_gguf(bfloat16_model, tmp_path / "full", quant="F32", name="m", report=lambda status: None)
    quantize(tmp_path / "full", tmp_path / "other.gguf", "Q4_K_M")
    ours, other = (GGUFReader(tmp_path / name).tensors for name in ("m.gguf", "other.gguf"))
    assert {tensor.name: tensor.data.tobytes() for tensor in ours} == {
        tensor.name: tensor.data.tobytes() for tensor in other
    }


@pytest.mark.parametrize("quant", ["F32", "Q4_0"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_export_is_caught_and_put_aside(fault, quant, make_model, tmp_path, monkeypatch):
    name, value = FAULTS[fault]
    monkeypatch.setattr(writer if name == "rotary_order" else tensor_map, name, value)
    out = tmp_path / "m.gguf"
    out.write_bytes(b"the earlier export")
    shown = []
    with pytest.raises(UserError, match="export failed verification"):
        export(GGUF(quant=quant), Source(folder=make_model(), name="m"), out, show=shown.append)
    assert out.read_bytes() == b"the earlier export"
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "certificate.json",
        "m.gguf",
        "m.rejected.gguf",
    ]
    assert list(certificate.read(tmp_path)["certificates"]) == ["m.rejected.gguf"]
    assert not shown[0].passed and "FAILED" in certificate.table(shown[0])


@pytest.mark.parametrize("quant", ["F32", "BF16", "Q8_0", "Q4_K_M"])
def test_a_right_export_passes_and_says_everything(quant, make_model, tmp_path):
    folder, out = make_model(), tmp_path / "m.gguf"
    [made] = export(GGUF(quant=quant), Source(folder=folder, name="small"), out)
    assert made.passed
    entry = json.loads((tmp_path / "certificate.json").read_text(encoding="utf-8"))["certificates"]["m.gguf"]
    assert entry["verdict"] == "pass" and entry["failures"] == []
    assert entry["sha256"] == {"m.gguf": sha256(out)}
    assert entry["model_sha256"] == {"model.safetensors": sha256(folder / "model.safetensors")}
    assert entry["num_bytes"] == out.stat().st_size
    assert entry["held_out"] == "built-in text" and {"torch", "llama-cpp-python"} <= set(entry["versions"])
    whats = [check["what"] for check in entry["checks"]]
    assert whats[0] == quant and ("before quantising" in whats) == (quant.startswith("Q"))
    got = entry["checks"][0]["measures"]
    assert got["num_positions"] == 320 and 0 <= got["mean_kl"] < 0.02 and got["top1_agreement"] > 0.95
    assert got["export_perplexity"] == pytest.approx(got["reference_perplexity"], rel=0.1)
    assert [file.name for file in tmp_path.iterdir() if "tmp" in file.name] == []


def test_another_tokenizer_in_the_file_is_caught(make_model, tmp_path, monkeypatch):
    def reversed_merges(*model):
        for key, kind, value in tokenizer_keys(*model):
            yield key, kind, value[::-1] if key.endswith(".merges") else value

    monkeypatch.setattr(writer, "tokenizer_keys", reversed_merges)
    with pytest.raises(UserError, match="tokenizer gives other ids"):
        export(GGUF(quant="F32"), Source(folder=make_model(), name="m"), tmp_path / "m.gguf")
