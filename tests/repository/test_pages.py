"""The pages are current: generated parts are what the generator writes, files and modules named in prose exist."""

import importlib.util
import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (".github", "docs", "examples", "export", "kernels", "serve", "training")
PAGES = sorted([*ROOT.glob("*.md"), *(page for name in FOLDERS for page in (ROOT / name).rglob("*.md"))])
PACKAGES = {
    "minicpm_edge": ROOT,
    "minicpm_kernels": ROOT / "kernels",
    "minicpm_training": ROOT / "training",
    "minicpm_export": ROOT / "export",
    "minicpm_serve": ROOT / "serve",
    "minicpm_kernels_testing": ROOT / "kernels" / "testing",
    "ptx_emulator": ROOT / "kernels" / "ptx_emulator",
}
# A reader's own, in examples of commands, and a library that is called like a file.
NOT_OURS = {"recipe.toml", "other.toml", "quickstart/recipe.toml", "transformers.js"}
SOURCE = r"(?:py|js|css|toml|sh|yml)"


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_current(generator):
    pages = generator.pages()
    assert len(pages) == 4
    for page, text in pages.items():
        assert page.read_text(encoding="utf-8") == text, f"{page.name}: run python docs/generate.py"


def test_every_generated_part_is_on_a_page(generator):
    found = [
        match["name"]
        for page in generator.PAGES
        for match in generator.SECTION.finditer(page.read_text("utf-8"))
    ]
    assert sorted(found) == sorted(generator.SECTIONS)


def test_every_source_file_is_in_the_tree(generator):
    """Each file that git knows (or would add) with a sentence of its own has a line below its own folder's."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    try:
        names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    files = {ROOT / name for name in names if (ROOT / name).is_file()}
    assert len(files) > 200
    for file in files:
        assert generator.first_sentence(file), f"{file} has no docstring"
    folders, listed = [], set()
    for line in generator.tree().splitlines():
        entry = re.match(r"( *)([\w./-]+)(?= |$)", line)
        if entry and entry[2].endswith(("/", ".py")):
            folders = [*folders[: len(entry[1]) // 2], entry[2]]
            listed.add(ROOT / "".join(folders))
    missed = {file for file in files if file.name != "__init__.py"} - listed
    assert not missed, missed


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.py", '"""One ``code`` of :class:`~a.b.C`\nand more. Not this."""\n', "One code of C and more"),
        ("a.py", '"""First.\n\nSecond."""\n', "First"),
        ("a.py", '"""What … and ``*.py``: e.g. this one."""\n', "What … and *.py: e.g"),
        ("a.py", "x = 1\n", ""),
        ("a.js", "// A page: one, and\n// two. Three.\nlet x;\n", "A page: one, and two"),
        ("a.css", "/* Quiet. */\n", "Quiet"),
        ("a.toml", "# A model. More.\nx = 1\n", "A model"),
        ("a.sh", "#!/bin/sh\n# Check.\n", "Check"),
    ],
)
def test_first_sentence(generator, tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert generator.first_sentence(tmp_path / name) == sentence


def test_gpu_table_is_of_files_from_a_card(generator, tmp_path):
    def row(peer, rate):
        return {"op": "attention", "shape": "4k", "peer": peer, "rate": rate, "rate_unit": "TFLOP/s"}

    def write(name, environment, rows):
        content = {"environment": environment} | ({"rows": rows} if rows else {})
        (tmp_path / name).write_text(json.dumps(content))

    write("cpu.json", {"device": "a CPU"}, [row("ours", 1.0), row("eager", 1.0)])
    assert "not been run on a GPU" in generator.gpu_table(tmp_path)
    rows = [row("ours", 440.0), row("slow", 200.0), row("fast", 400.0), row("absent", None)]
    write("attention.json", {"device": "a card", "cuda": "13.0"}, rows)
    write("curve_check.json", {"device": "a card", "cuda": "13.0"}, None)
    line = generator.gpu_table(tmp_path).splitlines()[-1]
    assert line == "| attention | 4k | 440 TFLOP/s | fast | 400 | 1.10× | a card |"


def code(page):
    """What a page sets as code: spans and blocks, generated ones left out."""
    text = re.sub(r"<!-- tree -->.*?<!-- end -->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [*re.findall(r"`([^`\n]+)`", prose), *blocks]


def missing_files(text, page):
    """Paths of sources in ``text`` that are neither at the root, beside the page, nor at the end of a path below it.

    A name with a capital part (``NAME.py``, ``test_NAME.py``) stands for any file, and * for any name.
    """
    own = page.parent if page.parent not in (ROOT, ROOT / "docs") else None
    for path in re.findall(rf"(?<![\\\w/.*-])[\w./*-]*\.{SOURCE}\b(?!\.)", text):
        if re.search(r"[A-Z]{3}", path) or path in NOT_OURS:
            continue
        found = [*ROOT.glob(path), *page.parent.glob(path), *(own.rglob(path) if own else ())]
        if not found:
            yield path


def missing_names(text):
    """Dotted names of our packages in ``text`` that are no module, and no name that a module defines."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name in re.findall(rf"(?<![\w./-])(?:{'|'.join(PACKAGES)})(?:\.\w+)+", text):
        package, *parts = name.split(".")
        place = PACKAGES[package] / package
        while parts and ((place / parts[0]).is_dir() or (place / f"{parts[0]}.py").is_file()):
            place /= parts.pop(0)
        module = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        defined = not parts or re.search(rf"\b{parts[0]}\b", module.read_text(encoding="utf-8"))
        if not defined and name not in project["entry-points"]:
            yield name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_file_and_module_named_exists(page):
    wrong = [name for text in code(page) for name in (*missing_files(text, page), *missing_names(text))]
    assert not wrong


def test_a_wrong_name_is_found():
    page = ROOT / "training" / "README.md"
    assert list(missing_files("`schedule.py`, `data/sources.py`, `recipes/*.toml`, `NAME.py`", page)) == []
    assert list(missing_files("a `feed.py`, python training/benchmarks/none.py", page)) == [
        "feed.py",
        "training/benchmarks/none.py",
    ]
    names = "minicpm_edge.load.load minicpm_edge.text minicpm_training.nowhere minicpm_edge.load.nothing_here"
    assert list(missing_names(names)) == ["minicpm_training.nowhere", "minicpm_edge.load.nothing_here"]
    assert list(missing_names("minicpm_edge.commands")) == []


def test_the_recipes_on_the_training_page_are_recipes():
    recipe = pytest.importorskip("minicpm_training.recipe.schema").Recipe
    page = (ROOT / "training" / "README.md").read_text(encoding="utf-8")
    whole, stages, init = (
        tomllib.loads(text) for text in re.findall(r"^```toml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    )
    parsed = recipe.model_validate(whole)
    assert parsed.trunk_steps == 1221 and parsed.model.preset == "tiny"
    del whole["data"]["decay"]
    listed = recipe.model_validate({**whole, "schedule": {}, **stages})
    assert [stage.name for stage in listed.plan.stages] == ["stable", "large batch", "decay", "chats"]
    assert len(listed.plan.trunk) == 2
    del whole["model"]
    started = recipe.model_validate({**whole, **init})
    assert started.init.untie and started.init.upcycle.experts == 8
