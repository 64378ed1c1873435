"""A certificate that is worth something: a file that is not the model is caught, whatever its type."""

import dataclasses
import json
import math

import pytest
from minicpm_export import destination
from minicpm_export.gguf import job as gguf_job
from minicpm_export.gguf import tensor_map as gguf_map
from minicpm_export.gguf import writer as gguf
from minicpm_export.gguf.job import export_gguf
from minicpm_export.hf import job as huggingface
from minicpm_export.request import Request
from minicpm_export.verify import certificate
from minicpm_export.verify.certificate import THRESHOLDS, Check
from minicpm_export.verify.measures import Measures

from minicpm_edge.errors import UserError


def without(key):
    """The key table without one key: a reader takes its own default."""
    return tuple(row for row in gguf_map.KEYS if row[0] != key)


def with_value(key, value):
    return tuple((name, kind, value if name == key else read) for name, kind, read in gguf_map.KEYS)


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
    "rotary rows not reordered": ("rotary_order", lambda heads, size: gguf_map.np.arange(heads * size)),
    "gate and up exchanged": (
        "_DENSE",
        (
            ("ffn_gate", "mlp.up_proj", None, False),
            ("ffn_up", "mlp.gate_proj", None, False),
            ("ffn_down", "mlp.down_proj", None, False),
        ),
    ),
}


@pytest.mark.parametrize("quant", ["F32", "Q4_0"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_export_is_caught_and_put_aside(fault, quant, make_model, tmp_path, monkeypatch):
    name, value = FAULTS[fault]
    monkeypatch.setattr(gguf_map, name, value)
    out = tmp_path / "m.gguf"
    out.write_bytes(b"the earlier export")
    shown = []
    with pytest.raises(UserError, match="the export is not the model"):
        export_gguf(Request(folder=make_model(), name="m", show=shown.append), out, quant)
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
    made = export_gguf(Request(folder=folder, name="small"), out, quant)
    assert made.passed
    entry = json.loads((tmp_path / "certificate.json").read_text(encoding="utf-8"))["certificates"]["m.gguf"]
    assert entry["verdict"] == "pass" and entry["failures"] == []
    assert entry["sha256"] == {"m.gguf": certificate.sha256(out)}
    assert entry["model_sha256"] == {"model.safetensors": certificate.sha256(folder / "model.safetensors")}
    assert entry["num_bytes"] == out.stat().st_size
    assert entry["held_out"] == "built-in text" and {"torch", "llama-cpp-python"} <= set(entry["versions"])
    whats = [check["what"] for check in entry["checks"]]
    assert whats[0] == quant and ("before quantising" in whats) == (quant.startswith("Q"))
    got = entry["checks"][0]["measures"]
    assert got["num_positions"] == 320 and 0 <= got["mean_kl"] < 0.02 and got["top1_agreement"] > 0.95
    assert got["export_perplexity"] == pytest.approx(got["reference_perplexity"], rel=0.1)
    assert [file.name for file in tmp_path.iterdir() if "tmp" in file.name] == []


def test_certificates_of_one_folder_live_side_by_side(make_model, tmp_path):
    request = Request(folder=make_model(), name="small")
    export_gguf(request, tmp_path / "a.gguf", "F16")
    export_gguf(request, tmp_path / "b.gguf", "Q8_0")
    first = export_gguf(request, tmp_path / "a.gguf", "F32")
    entries = certificate.read(tmp_path)["certificates"]
    assert sorted(entries) == ["a.gguf", "b.gguf"]
    assert entries["a.gguf"]["sha256"] == dict(first.sha256)


def test_another_tokenizer_in_the_file_is_caught(make_model, tmp_path, monkeypatch):
    from minicpm_export.gguf import tokenizer as gguf_tokenizer

    def reversed_merges(tokenizer, config):
        for key, kind, value in original(tokenizer, config):
            yield key, kind, value[::-1] if key.endswith(".merges") else value

    original = gguf_tokenizer.entries
    monkeypatch.setattr(gguf.gguf_tokenizer, "entries", reversed_merges)
    with pytest.raises(UserError, match="tokenizer gives other ids"):
        export_gguf(Request(folder=make_model(), name="m"), tmp_path / "m.gguf", "F32")


def test_a_damaged_copy_is_caught(make_model, tmp_path, monkeypatch):
    def flip_one_bit(source, target):
        data = bytearray(source.read_bytes())
        data[-5] ^= 1
        target.write_bytes(data)

    monkeypatch.setattr(huggingface.shutil, "copyfile", flip_one_bit)
    with pytest.raises(UserError, match="differs"):
        huggingface.export_huggingface(Request(folder=make_model(), name="m"), tmp_path / "m")
    assert (tmp_path / "m.rejected").is_dir() and not (tmp_path / "m").exists()


GOOD = Measures(
    num_positions=1000,
    mean_kl=1e-9,
    p99_kl=1e-8,
    max_kl=1e-7,
    top1_agreement=1.0,
    reference_perplexity=20.0,
    export_perplexity=20.0,
    max_logit_difference=5e-4,
    logit_std=1.0,
)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"mean_kl": 1e-3}, "mean KL"),
        ({"p99_kl": 1.0}, "99th-percentile"),
        ({"top1_agreement": 0.5}, "top-1"),
        ({"max_logit_difference": 2e-3}, "logit"),
        ({"mean_kl": math.nan}, "mean KL"),
        ({"top1_agreement": math.nan}, "top-1"),
        ({"max_logit_difference": math.nan}, "logit"),
    ],
)
def test_each_figure_has_its_limit_and_nan_never_passes(change, named):
    def failures(measures):
        check = Check(what="F32", runtime="r", measures=measures, thresholds=THRESHOLDS["F32"])
        return check.failures()

    assert failures(GOOD) == []
    (line,) = failures(dataclasses.replace(GOOD, **change))
    assert named in line
    if "nan" not in line:
        spread = dataclasses.replace(GOOD, max_logit_difference=2e-3, logit_std=3.0)
        assert failures(spread) == []  # rounding grows with the logits


def test_limits_loosen_with_the_type():
    order = ["exact", "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0"]
    for figure in ("mean_kl", "p99_kl"):
        values = [getattr(THRESHOLDS[name], figure) for name in order]
        assert values == sorted(values)


def test_a_broken_certificate_file_is_replaced(make_model, tmp_path):
    (tmp_path / "certificate.json").write_text("{", encoding="utf-8")
    export_gguf(Request(folder=make_model(), name="small"), tmp_path / "a.gguf", "F32")
    assert list(certificate.read(tmp_path)["certificates"]) == ["a.gguf"]


def test_what_is_not_a_number_is_still_valid_json(make_model, tmp_path):
    made = export_gguf(Request(folder=make_model(), name="small"), tmp_path / "a.gguf", "F32")
    broken = dataclasses.replace(GOOD, mean_kl=math.nan, export_perplexity=math.inf)
    check = dataclasses.replace(made.checks[0], measures=broken)
    certificate.write(tmp_path, dataclasses.replace(made, checks=(check,)))

    def refuse(constant):
        raise AssertionError(constant)

    document = json.loads((tmp_path / "certificate.json").read_text(encoding="utf-8"), parse_constant=refuse)
    entry = document["certificates"]["a.gguf"]
    assert entry["verdict"] == "fail" and entry["checks"][0]["measures"]["export_perplexity"] == "inf"


def test_own_text_and_its_faults(make_model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day in April, and the clocks said so. " * 40, encoding="utf-8")
    request = Request(folder=make_model(), name="m", text=text)
    made = export_gguf(request, tmp_path / "m.gguf", "F32")
    assert made.held_out == str(text)
    lines = tmp_path / "text.jsonl"
    lines.write_text(
        f'{json.dumps({"text": text.read_text(encoding="utf-8")})}\n[1]\n{{"text": "cut o', "utf-8"
    )
    again = export_gguf(dataclasses.replace(request, text=lines), tmp_path / "m.gguf", "F32")
    assert again.checks[0].measures == made.checks[0].measures
    for content, message in ((b"short", "only .* tokens"), (b"\0\1" * 500, "not a text file")):
        text.write_bytes(content)
        with pytest.raises(UserError, match=message):
            export_gguf(request, tmp_path / "m.gguf", "F32")
    text.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        export_gguf(request, tmp_path / "m.gguf", "F32")


def test_the_validation_set_of_a_run_is_used(make_model, small_config, tmp_path):
    import numpy as np
    from minicpm_export.verify.windows import held_out

    from minicpm_edge.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(make_model())
    (tmp_path / "held").mkdir()
    tokens = np.tile(np.array([1, 40, 41, 42, 2], dtype="<u2"), 60)
    tokens.tofile(tmp_path / "held" / "tokens-00000.bin")
    (tmp_path / "held" / "manifest.json").write_text('{"dtype": "uint16"}', encoding="utf-8")
    recipe = f'[data]\n[[data.valid]]\npath = "{(tmp_path / "held").as_posix()}"\n'
    (tmp_path / "recipe.toml").write_text(recipe, encoding="utf-8")
    text = held_out(tokenizer, small_config, run=tmp_path)
    assert text.name == "validation set held"
    assert text.windows[0].ids[:6] == [1, 1, 40, 41, 42, 2]
    # The token after the end of a document is nobody's to predict.
    assert text.windows[0].targets[:7] == [1, 40, 41, 42, 2, -1, 40]
    assert held_out(tokenizer, small_config, run=tmp_path / "held").name == "built-in text"


def test_rejected_folders_and_files_have_names_of_their_own(tmp_path, make_model):
    failed = export_gguf(Request(folder=make_model(), name="m"), tmp_path / "x.gguf", "F32")
    folder = tmp_path / "work"
    folder.mkdir()
    error = destination.rejected(folder, tmp_path / "model-onnx", failed)
    assert (tmp_path / "model-onnx.rejected").is_dir() and "model-onnx.rejected" in str(error)
    assert gguf_job.NASTY  # the strings every GGUF is tested on
