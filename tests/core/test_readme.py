"""The README's tables are those of the result files, its tree is the tree."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def readme():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_and_tree_are_current(readme):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text == readme.filled(text), "run: python benchmarks/readme.py"


def test_gpu_table_is_of_files_from_a_card(readme, tmp_path):
    def row(peer, rate):
        return {"op": "attention", "shape": "4k", "peer": peer, "rate": rate, "rate_unit": "TFLOP/s"}

    def write(name, environment, rows):
        content = {"environment": environment} | ({"rows": rows} if rows else {})
        (tmp_path / name).write_text(json.dumps(content))

    write("cpu.json", {"device": "a CPU"}, [row("ours", 1.0), row("eager", 1.0)])
    assert "not been run on a GPU" in readme.gpu_table(tmp_path)
    rows = [row("ours", 440.0), row("slow", 200.0), row("fast", 400.0), row("absent", None)]
    write("attention.json", {"device": "a card", "cuda": "13.0"}, rows)
    write("curve_check.json", {"device": "a card", "cuda": "13.0"}, None)
    line = readme.gpu_table(tmp_path).splitlines()[-1]
    assert line == "| attention | 4k | 440 TFLOP/s | fast | 400 | 1.10× | a card |"


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *ROOT.glob("*/README.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page}: {target}"
