"""What the pipeline promises for any format: toy formats of the kinds that are still to come go through it."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from minicpm_export.cli import GGUF_TYPES
from minicpm_export.format import ExportedFile, ReadBack
from minicpm_export.gguf import format as gguf_format
from minicpm_export.gguf.format import GGUF
from minicpm_export.hf import format as hf_format
from minicpm_export.hf.format import HuggingFace
from minicpm_export.onnx import format as onnx_format
from minicpm_export.onnx.format import ONNX
from minicpm_export.pipeline import export
from minicpm_export.source import Source
from minicpm_export.verify import certificate
from minicpm_export.verify.compare import THRESHOLDS
from minicpm_export.verify.torch_runtime import TorchRuntime

from minicpm_edge.errors import UserError
from minicpm_edge.formats.checkpoint import load_checkpoint, save_checkpoint


class Shifted:
    """A runtime of another make: the source's logits, all of them off by one number, and nothing after it is closed."""

    name = "toy runtime 1.0"

    def __init__(self, folder, shift):
        self._model, self._shift, self.is_open = TorchRuntime(folder), shift, True

    def logits(self, ids):
        assert self.is_open
        return self._model.logits(ids) + self._shift


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """As a web bundle will be: two files that users load, a page that both need, and a runtime that is not Python's."""

    shifts: tuple[float, float] = (0.0, 0.0)
    forgets_its_page: bool = False
    is_folder: ClassVar[bool] = True

    def file_name(self, model):
        return f"{model}-bundle"

    def disk_bytes(self, source):
        return 1000

    def write(self, source, out, scratch, report):
        report("bundling")
        (scratch / "intermediate").write_bytes(bytes(9))
        (out / "weights").mkdir()
        for number, shift in enumerate(self.shifts):
            (out / "weights" / f"{number}.json").write_text(json.dumps(shift), encoding="utf-8")
        (out / "index.html").write_text("<p>hello", encoding="utf-8")

    def exported(self, source, out, scratch):
        assert (scratch / "intermediate").stat().st_size == 9
        return [self._exported(source, out, out / "weights" / f"{number}.json") for number in (0, 1)]

    def _exported(self, source, out, path):
        @contextmanager
        def runtime(length):
            assert length == 160
            opened = Shifted(source.folder, json.loads(path.read_text(encoding="utf-8")))
            yield opened
            opened.is_open = False

        return ExportedFile(
            path=path,
            quant="F32",
            files=[path],
            shared_files=[] if self.forgets_its_page else [out / "index.html"],
            read_backs=[
                ReadBack(what="F32", thresholds=THRESHOLDS["F32"], open=runtime, first_window_only=True)
            ],
        )


@dataclass(frozen=True, kw_only=True)
class Copy:
    """As an importer will be: one file, compared with the source byte by byte and on no text."""

    content: bytes | None = None
    is_folder: ClassVar[bool] = False

    def file_name(self, model):
        return f"{model}.copy"

    def disk_bytes(self, source):
        return 1000

    def write(self, source, out, scratch, report):
        out.write_bytes(self.content or self._original(source))

    def exported(self, source, out, scratch):
        same = out.read_bytes() == self._original(source)
        failures = [] if same else ["the bytes differ"]
        return [ExportedFile(path=out, quant="as stored", files=[out], failures=failures, notes=["a copy"])]

    @staticmethod
    def _original(source):
        return (source.folder / "config.json").read_bytes()


@pytest.fixture
def source(make_model):
    return Source(folder=make_model(), name="m")


def test_a_folder_of_several_files_read_back_elsewhere(source, tmp_path):
    reports, shown = [], []
    made = export(Bundle(), source, tmp_path / "b", report=reports.append, show=shown.append)
    assert made == shown and [one.file for one in made] == ["weights/0.json", "weights/1.json"]
    entries = certificate.read(tmp_path / "b")["certificates"]
    assert [list(entry["sha256"]) for entry in entries.values()] == [
        ["weights/0.json", "index.html"],
        ["weights/1.json", "index.html"],
    ]
    assert {entry["checks"][0]["runtime"] for entry in entries.values()} == {"toy runtime 1.0"}
    assert made[0].num_bytes == 3 and made[0].checks[0].measures.num_positions == 160
    assert reports[0] == "bundling" and "window 1/1 in toy runtime" in reports[1]
    assert [path.name for path in tmp_path.iterdir()] == ["b"]  # nothing is left of the scratch folder


def test_one_wrong_file_of_several_fails_the_folder(source, tmp_path):
    shown = []
    with pytest.raises(UserError, match=r"export failed verification: F32: .*logit.*; kept at .*b\.rejected"):
        export(Bundle(shifts=(0.0, 0.5)), source, tmp_path / "b", show=shown.append)
    assert [one.passed for one in shown] == [True, False]
    assert [path.name for path in tmp_path.iterdir()] == ["b.rejected"]
    assert certificate.read(tmp_path / "b.rejected")["certificates"]["weights/1.json"]["verdict"] == "fail"


def test_a_file_that_no_certificate_names_is_a_bug(source, tmp_path):
    with pytest.raises(AssertionError, match=r"index\.html"):
        export(Bundle(forgets_its_page=True), source, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_with_the_source_needs_no_text_and_no_model_in_memory(source, tmp_path, monkeypatch):
    monkeypatch.setattr(Source, "reference", lambda self: pytest.fail("loaded for nothing"))
    [made] = export(Copy(), source, tmp_path / "m.copy")
    assert made.passed and made.held_out == "" and made.checks == ()
    assert certificate.table(made).splitlines() == ["a copy", f"sha256 {made.sha256['m.copy']}"]
    assert certificate.read(tmp_path)["certificates"]["m.copy"]["verdict"] == "pass"
    with pytest.raises(UserError, match="the bytes differ"):
        export(Copy(content=b"else"), source, tmp_path / "m.copy")
    assert json.loads((tmp_path / "m.copy").read_bytes())  # the earlier one
    assert (tmp_path / "m.rejected.copy").read_bytes() == b"else"
    assert sorted(certificate.read(tmp_path)["certificates"]) == ["m.copy", "m.rejected.copy"]


def test_a_failure_on_the_way_leaves_nothing(source, tmp_path, monkeypatch):
    monkeypatch.setattr(Copy, "exported", lambda *arguments: [][0])
    with pytest.raises(IndexError):
        export(Copy(), source, tmp_path / "m.copy")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", [Bundle(), Copy()])
def test_a_full_disk_is_told_before_any_work(form, make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=999))
    with pytest.raises(UserError, match=r"takes about 0\.0 GB.*make room, or name another disk by --out"):
        export(form, Source(folder=make_model(), name="m"), tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


FORMS = [
    *(GGUF(quant=quant) for quant in GGUF_TYPES),
    ONNX(quants=["F32"]),
    ONNX(),
    *(HuggingFace(architecture=name) for name in ("own", "granite", "llama")),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_room_that_a_format_asks_for_is_enough(form, dtype, make_model, tmp_path, monkeypatch):
    """Without the fixed part, which is for tokenizers, and with what it writes on the way."""
    folder = tmp_path / "m"
    original = make_model(vocab_size=20_000)  # so that weights outweigh the rest
    save_checkpoint(folder, load_checkpoint(original, dtype=dtype), tokenizer=original)
    source = Source(folder=folder, name="m")
    for module in (gguf_format, onnx_format, hf_format):
        for name in ("TOKENIZER_BYTES", "SETTINGS_BYTES"):
            monkeypatch.setattr(module, name, 0, raising=False)
    (tmp_path / "scratch").mkdir()
    if form.is_folder:
        (tmp_path / "out").mkdir()
    form.write(source, tmp_path / "out", tmp_path / "scratch", lambda status: None)
    written = [
        file for name in ("out", "scratch") for file in [tmp_path / name, *(tmp_path / name).rglob("*")]
    ]
    size = sum(
        file.stat().st_size for file in written if file.is_file() and not file.name.startswith("tokenizer")
    )
    asked = form.disk_bytes(source)
    assert asked / 2 < size < asked + (2 << 20)
