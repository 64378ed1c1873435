"""Fill the generated parts of the pages: ``python docs/generate.py``. A test checks that they are current.

Text between ``<!-- NAME -->`` and ``<!-- end -->`` is replaced: tables of measurements come from result files, the tree
of files from the first sentence of each file. docs/cli.md is generated as a whole, from the commands' parsers.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CLI_PAGE = ROOT / "docs" / "cli.md"
PAGES = (ROOT / "README.md", ROOT / "docs" / "architecture.md", ROOT / "kernels" / "README.md")
SECTION = re.compile(r"(<!-- (?P<name>[a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

# The tree: a heading and the folders below it.
PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Core: what every part shares", ("minicpm_edge",)),
    ("Kernels", ("kernels/minicpm_kernels",)),
    ("Kernels: tools for testing them, not in the wheel", ("kernels/testing", "kernels/ptx_emulator")),
    ("Training", ("training/minicpm_training",)),
    ("Export", ("export/minicpm_export",)),
    ("Serve", ("serve/minicpm_serve",)),
    ("Tests", ("tests",)),
    (
        "Examples, benchmarks, tools",
        (
            "examples",
            "kernels/benchmarks",
            "training/benchmarks",
            "export/benchmarks",
            "benchmarks",
            "docs",
            ".ci",
        ),
    ),
)
COMMENTS = {".js": r"// ?", ".css": r"/\* ?", ".toml": r"# ?", ".sh": r"# ?"}
NAME_WIDTH = 36


def read(path: str) -> dict[str, Any]:
    """A result file."""
    content: dict[str, Any] = json.loads((ROOT / path).read_text(encoding="utf-8"))
    return content


def step_table() -> str:
    """Training step beside transformers' Llama."""
    lines = [
        "| training step, tokens/s | ours | `transformers` Llama | ratio | our MFU |",
        "|---|---|---|---|---|",
    ]
    sequences = {"whole": "one document a sequence", "packed": "packed sequences"}
    for row in read("training/benchmarks/results/step.json")["results"]:
        ours, theirs = row["ours"], row["transformers"]["tokens_per_second"]
        name = f"{row['model']}, {row['precision']}, {sequences[row['rows']]}"
        speeds = f"{ours['tokens_per_second']:,.0f} | {theirs:,.0f}"
        lines.append(f"| {name} | {speeds} | {row['ratio']:.2f}× | {ours['mfu']:.0%} |")
    return "\n".join(lines)


def prepare_table() -> str:
    """Preparing text beside datasets + tokenizers."""
    peer = "datasets + tokenizers"
    lines = ["| preparing text, MB/s | ours | `datasets` + `tokenizers` | ratio |", "|---|---|---|---|"]
    for row in read("training/benchmarks/results/prepare.json")["results"]:
        speeds = f"{row['ours']['megabytes_per_second']:.1f} | {row[peer]['megabytes_per_second']:.1f}"
        plural = "" if row["workers"] == 1 else "es"
        lines.append(
            f"| {row['workers']} process{plural} | {speeds} | {row['ratio']['megabytes_per_second']:.2f}× |"
        )
    return "\n".join(lines)


def exports_table() -> str:
    """What the usual exports cost; export/README.md lists every type."""
    lines = ["| export of a 4.2M model | MB | mean KL to fp32 | top-1 agreement |", "|---|---|---|---|"]
    shown = (("GGUF", "F16"), ("GGUF", "Q8_0"), ("GGUF", "Q4_K_M"), ("ONNX", "F32"), ("ONNX", "INT8"))
    for row in read("export/benchmarks/results/cost.json")["rows"]:
        if (row["form"], row["type"]) in shown:
            size = f"{row['megabytes']:.1f}"
            figures = f"{size} | {row['mean_kl']:.1e} | {row['top1_agreement']:.1%}"
            lines.append(f"| {row['form']} {row['type']} | {figures} |")
    return "\n".join(lines)


def ops_table() -> str:
    """The ops on a CPU beside the same formulas in eager torch."""
    rows = read("kernels/benchmarks/results/cpu.json")["rows"]
    lines = ["| op on a CPU, forward and backward | shape | times as fast as eager |", "|---|---|---|"]
    lines += [
        f"| {row['op']} | {row['shape']} | {row['rate']:.2f}× |" for row in rows if row["peer"] == "ours"
    ]
    return "\n".join(lines)


def gpu_table(folder: Path = ROOT / "kernels/benchmarks/results") -> str:
    """Ours and the best peer on a card, from what files of it there are."""
    files = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    files = [file for file in files if file["environment"].get("cuda") and file.get("complete", True)]
    if not files:
        return "**The kernels have not been run on a GPU yet**: no GPU figure is claimed."
    lines = [
        "| on a card | shape | ours | best peer | its rate | ratio | card |",
        "|---|---|---|---|---|---|---|",
    ]
    for file in files:
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in file.get("rows", []):
            if row["rate"] is not None:
                groups.setdefault((row["op"], row["shape"]), []).append(row)
        for (op, shape), rows in groups.items():
            ours = [row for row in rows if row["peer"].split(",")[0] == "ours"]
            peers = [row for row in rows if row not in ours]
            if ours and peers:
                best = max(peers, key=lambda row: row["rate"])
                rates = f"{ours[0]['rate']:.3g} {ours[0]['rate_unit']} | {best['peer']} | {best['rate']:.3g}"
                ratio = f"{ours[0]['rate'] / best['rate']:.2f}×"
                lines.append(f"| {op} | {shape} | {rates} | {ratio} | {file['environment']['device']} |")
    return "\n".join(lines)


def tree() -> str:
    """Every folder and file with the first sentence that it says of itself, part by part."""
    blocks = []
    for title, folders in PARTS:
        lines = [line for folder in folders for line in _folder_lines(ROOT / folder, 0, folder)]
        blocks.append(f"### {title}\n\n```\n" + "\n".join(lines) + "\n```")
    return "\n\n".join(blocks)


def _folder_lines(folder: Path, depth: int, name: str) -> Iterator[str]:
    """The lines of one folder: its own, its files, then the folders in it."""
    files = [path for path in _sources(folder) if path.parent == folder]
    init = folder / "__init__.py"
    yield _line(f"{name}/", depth, first_sentence(init) if init.is_file() else "")
    for file in files:
        sentence = first_sentence(file)
        if file.name != "__init__.py" and sentence:
            yield _line(file.name, depth + 1, sentence)
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and any(_sources(path))):
        yield from _folder_lines(inner, depth + 1, inner.name)


def _line(name: str, depth: int, sentence: str) -> str:
    indented = "  " * depth + name
    return f"{indented:<{NAME_WIDTH}} {sentence}".rstrip()


def _sources(folder: Path) -> Iterator[Path]:
    """The files below a folder that say in a first sentence what they are."""
    return (file for file in sorted(folder.rglob("*")) if file.suffix in (".py", *COMMENTS))


def first_sentence(file: Path) -> str:
    """The first sentence of a module's docstring or of a file's first comment, without markup and full stop."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        said = ast.get_docstring(ast.parse(text)) or ""
    else:
        mark = COMMENTS[file.suffix]
        found = re.match(rf"(?:{mark}.*\n?)*", re.sub(r"^#!.*\n", "", text))
        said = re.sub(rf"^{mark}|\*/", "", found[0] if found else "", flags=re.MULTILINE)
    said = " ".join(said.partition("\n\n")[0].split())
    said = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", said).replace("`", "")
    return re.split(r"(?<=[^.]\.)\s", said, maxsplit=1)[0].rstrip(".")


SECTIONS: Mapping[str, Callable[[], str]] = {
    "step": step_table,
    "prepare": prepare_table,
    "exports": exports_table,
    "ops": ops_table,
    "gpu": gpu_table,
    "tree": tree,
}


def filled(text: str) -> str:
    """A page with every section made anew."""
    return SECTION.sub(lambda found: found[1] + SECTIONS[found["name"]]() + "\n" + found[3], text)


def pages() -> dict[Path, str]:
    """Every page with generated parts, as it should be."""
    from minicpm_edge.cli.reference import reference

    texts = {page: filled(page.read_text(encoding="utf-8")) for page in PAGES}
    return texts | {CLI_PAGE: reference()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8", newline="\n")
