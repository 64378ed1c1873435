"""Fill the README's tables and tree: ``python benchmarks/readme.py``. Tables come from result files only.

Text between ``<!-- NAME -->`` and ``<!-- end -->`` is replaced; a test checks that it is current.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    ("minicpm_edge", "core: what every part shares"),
    ("kernels/minicpm_kernels", "Triton ops, each beside its plain-torch reference"),
    ("training/minicpm_training", "data, schedule, optimizer, trainer, evaluation"),
    ("export/minicpm_export", "GGUF, ONNX, Hugging Face folder, the certificate"),
    ("serve/minicpm_serve", "API, chat page, terminal chat"),
)
OTHERS = (
    ("tests/", "by part, and end_to_end/"),
    ("examples/", "a model inside a Python app"),
    ("docs/", "cli.md (generated), reports/ (measured studies), log.md (what failed)"),
    ("benchmarks/gpu.sh", "every GPU check and benchmark in one command"),
    ("benchmarks/readme.py", "fills this page's tables and tree"),
    (".ci/", "the test command: wheel, lint, types, tests"),
    ("constraints.txt", "the versions that are tested together"),
)


def read(path: str) -> dict:
    """A result file."""
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def step_table() -> str:
    """Training step beside transformers' Llama."""
    results = read("training/benchmarks/results/step.json")
    lines = [
        "| training step, tokens/s | ours | `transformers` Llama | ratio | our MFU |",
        "|---|---|---|---|---|",
    ]
    for row in results["results"]:
        ours, theirs = row["ours"], row["transformers"]["tokens_per_second"]
        name = f"{row['model']}, {row['precision']}, {row['rows']} rows"
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


def certificate_table() -> str:
    """What each export costs."""
    lines = ["| export of a 4.2M model | MB | mean KL to fp32 | top-1 agreement |", "|---|---|---|---|"]
    for row in read("export/benchmarks/results/cost.json")["rows"]:
        size = f"{row['megabytes']:.1f}"
        lines.append(
            f"| {row['form']} {row['type']} | {size} | {row['mean_kl']:.1e} | {row['top1_agreement']:.1%} |"
        )
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
        return "**They have not been run on a GPU yet**: no GPU figure is claimed."
    lines = [
        "| on a card | shape | ours | best peer | its rate | ratio | card |",
        "|---|---|---|---|---|---|---|",
    ]
    for file in files:
        groups: dict[tuple[str, str], list[dict]] = {}
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
    """One line a file, from the first line of its docstring."""
    lines = []
    for folder, purpose in PACKAGES:
        lines.append(f"{folder + '/':<34}{purpose}")
        files = sorted((ROOT / folder).rglob("*.py"), key=lambda file: (len(file.parts), file))
        lines += [
            f"  {file.relative_to(ROOT / folder).as_posix():<32}{first_line(file)}"
            for file in files
            if file.name != "__init__.py"
        ]
    lines += [f"{name:<34}{purpose}" for name, purpose in OTHERS]
    return "```\n" + "\n".join(lines) + "\n```"


def first_line(file: Path) -> str:
    """The first line of a module's docstring, without quotes of code and the full stop."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return docstring.splitlines()[0].replace("``", "").rstrip(".") if docstring else ""


SECTIONS = {
    "step": step_table,
    "prepare": prepare_table,
    "certificate": certificate_table,
    "ops": ops_table,
    "gpu": gpu_table,
    "tree": tree,
}


def filled(text: str) -> str:
    """The README with every section made anew."""
    for name, make in SECTIONS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert pattern.search(text), f"README.md has no section {name}"
        text = pattern.sub(lambda found, make=make: found[1] + make() + "\n" + found[2], text)
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
