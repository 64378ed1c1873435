"""What every export type costs: size, time to write, and how far its predictions are from the model's.

    python export/benchmarks/cost.py MODEL [--text FILE] [--note "what the model is"]

Writes results/cost.json and from it the table in the README. An export that fails its verification ends the benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

from minicpm_export.cli import GGUF_TYPES, ONNX_TYPES
from minicpm_export.format import Format
from minicpm_export.gguf.format import GGUF
from minicpm_export.onnx.format import ONNX
from minicpm_export.pipeline import export
from minicpm_export.source import Source
from minicpm_export.verify.certificate import Certificate
from minicpm_export.verify.compare import VERIFYING

from minicpm_edge.formats.checkpoint import read_config
from minicpm_edge.formats.resolve import resolve_model
from minicpm_edge.model.transformer import count_parameters

RESULTS = Path(__file__).parent / "results" / "cost.json"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- cost.py writes from here -->", "<!-- to here -->"


def measure(source: Source, folder: Path) -> list[dict]:
    """One row for each type; the seconds are from the start to the first window that is compared."""
    forms: list[tuple[str, Format]] = [("GGUF", GGUF(quant=quant)) for quant in GGUF_TYPES]
    forms += [("ONNX", ONNX(quants=(quant,))) for quant in ONNX_TYPES]
    rows = []
    for number, (name, form) in enumerate(forms):
        begun, written = time.perf_counter(), []

        def report(status: str, written: list[float] = written) -> None:
            if status.startswith(VERIFYING) and not written:
                written.append(time.perf_counter())

        [made] = export(form, source, folder / f"{number}{'' if form.is_folder else '.gguf'}", report=report)
        rows.append(row(name, made, written[0] - begun))
        print(line(rows[-1]), flush=True)
    return rows


def row(form: str, made: Certificate, seconds: float) -> dict:
    figures = made.checks[0].measures
    return {
        "form": form,
        "type": made.quant,
        "megabytes": made.num_bytes / 1e6,
        "seconds_to_write": seconds,
        "mean_kl": figures.mean_kl,
        "p99_kl": figures.p99_kl,
        "top1_agreement": figures.top1_agreement,
        "perplexity": figures.export_perplexity,
        "fp32_perplexity": figures.reference_perplexity,
        "max_logit_difference": figures.max_logit_difference,
        "num_positions": figures.num_positions,
        "notes": list(made.notes),
        "versions": dict(made.versions),
    }


HEAD = (
    "| form | type | MB | mean KL | 99 % KL | top-1 | perplexity (fp32) | max Δlogit |\n"
    "|---|---|---|---|---|---|---|---|"
)


def line(entry: dict) -> str:
    return (
        f"| {entry['form']} | {entry['type']} | {entry['megabytes']:.1f} | {entry['mean_kl']:.1e} "
        f"| {entry['p99_kl']:.1e} | {entry['top1_agreement']:.1%} "
        f"| {entry['perplexity']:.2f} ({entry['fp32_perplexity']:.2f}) | {entry['max_logit_difference']:.1e} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--note", default="")
    arguments = parser.parse_args()
    found = resolve_model(arguments.model)
    source = Source(folder=found.path, name=found.name, run=found.run, text=arguments.text)
    print(HEAD)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(source, Path(folder))
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "model": arguments.note or found.name,
        "num_parameters": count_parameters(read_config(found.path), embeddings=True),
        "rows": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write_table(result)


def write_table(result: dict) -> None:
    """Put the results between the README's two marks."""
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    about = (
        f"{result['model']}; {result['num_parameters']:,} parameters; {result['machine']}, {result['date']}"
    )
    table = "\n".join([about, "", HEAD, *(line(entry) for entry in result["rows"])])
    README.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
