"""The certificate's file, and the limits on each of its figures."""

import dataclasses
import json
import math

import pytest
from minicpm_export.gguf.format import GGUF
from minicpm_export.pipeline import export
from minicpm_export.source import Source
from minicpm_export.verify import certificate
from minicpm_export.verify.compare import THRESHOLDS, Check
from minicpm_export.verify.measures import Measures

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


def test_certificates_of_one_folder_live_side_by_side(make_model, tmp_path):
    source = Source(folder=make_model(), name="small")
    export(GGUF(quant="F16"), source, tmp_path / "a.gguf")
    export(GGUF(quant="Q8_0"), source, tmp_path / "b.gguf")
    [first] = export(GGUF(quant="F32"), source, tmp_path / "a.gguf")
    entries = certificate.read(tmp_path)["certificates"]
    assert sorted(entries) == ["a.gguf", "b.gguf"]
    assert entries["a.gguf"]["sha256"] == dict(first.sha256)


def test_a_broken_certificate_file_is_replaced(make_model, tmp_path):
    (tmp_path / "certificate.json").write_text("{", encoding="utf-8")
    export(GGUF(quant="F32"), Source(folder=make_model(), name="small"), tmp_path / "a.gguf")
    assert list(certificate.read(tmp_path)["certificates"]) == ["a.gguf"]


def test_what_is_not_a_number_is_still_valid_json(make_model, tmp_path):
    [made] = export(GGUF(quant="F32"), Source(folder=make_model(), name="small"), tmp_path / "a.gguf")
    broken = dataclasses.replace(GOOD, mean_kl=math.nan, export_perplexity=math.inf)
    check = dataclasses.replace(made.checks[0], measures=broken)
    certificate.write(tmp_path, dataclasses.replace(made, checks=(check,)))

    def refuse(constant):
        raise AssertionError(constant)

    document = json.loads((tmp_path / "certificate.json").read_text(encoding="utf-8"), parse_constant=refuse)
    entry = document["certificates"]["a.gguf"]
    assert entry["verdict"] == "fail" and entry["checks"][0]["measures"]["export_perplexity"] == "inf"
