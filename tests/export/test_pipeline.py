"""What the pipeline promises for any format: toy formats of the kinds that are still to come go through it."""

import json
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import pytest
from minicpm_export.format import ExportedFile, ReadBack
from minicpm_export.pipeline import export
from minicpm_export.source import Source
from minicpm_export.verify import certificate
from minicpm_export.verify.compare import THRESHOLDS
from minicpm_export.verify.torch_runtime import TorchRuntime

from minicpm_edge.errors import UserError


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
