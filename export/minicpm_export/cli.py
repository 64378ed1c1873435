"""``minicpm-edge export``: a trained model in the form that another runtime reads, with proof that it is the model."""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minicpm_edge.cli.command import Command
from minicpm_edge.cli.progress import Progress
from minicpm_edge.errors import UserError
from minicpm_edge.formats.resolve import ModelRef, resolve_model
from minicpm_edge.interrupts import on_interrupt

if TYPE_CHECKING:
    from minicpm_export.format import Format
    from minicpm_export.verify.certificate import Certificate

GGUF_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0")
ONNX_TYPES = ("F32", "INT8")


@dataclass(frozen=True, kw_only=True)
class FormatOption:
    """A format as the command line offers it: nothing heavy is imported before it is chosen."""

    help: str
    quants: tuple[str, ...]
    """The types to choose from; none where the weights stay as they are."""
    make: Callable[[str | None, str], Format]
    """(type asked for or None, architecture) → the format."""


def _gguf(quant: str | None, architecture: str) -> Format:
    from minicpm_export.gguf.format import GGUF

    return GGUF(quant=quant or "Q4_K_M")


def _onnx(quant: str | None, architecture: str) -> Format:
    from minicpm_export.onnx.format import ONNX

    return ONNX(quants=(quant,) if quant else ONNX_TYPES)


def _huggingface(quant: str | None, architecture: str) -> Format:
    from minicpm_export.hf.format import HuggingFace

    return HuggingFace(architecture=architecture)


FORMATS: Mapping[str, FormatOption] = {
    "gguf": FormatOption(help="one file for llama.cpp", quants=GGUF_TYPES, make=_gguf),
    "onnx": FormatOption(help="a folder for ONNX Runtime and the web", quants=ONNX_TYPES, make=_onnx),
    "hf": FormatOption(help="a folder with the Hugging Face tensor names", quants=(), make=_huggingface),
}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a run, a checkpoint or a Hugging Face folder (default: the newest run under ./runs)",
    )
    form = parser.add_mutually_exclusive_group(required=True)
    for name, option in FORMATS.items():
        form.add_argument(f"--{name}", dest="form", action="store_const", const=name, help=option.help)
    parser.add_argument(
        "--quant",
        type=str.upper,
        metavar="TYPE",
        default=None,
        help=f"GGUF: {', '.join(GGUF_TYPES)} (default Q4_K_M); ONNX: {', '.join(ONNX_TYPES)} (default both)",
    )
    parser.add_argument(
        "--architecture",
        choices=("minicpm", "granite", "llama"),
        default=None,
        help="HF: the architecture's name in config.json (default: the model's own). granite has the same tensors, "
        "for transformers; llama has the scales multiplied into them, for all that runs a Llama",
    )
    parser.add_argument(
        "--out", type=Path, metavar="PATH", help="file or folder to write (default: in the run's exports/)"
    )
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="held-out text for the certificate, plain or .jsonl (default: the run's validation set, or our own)",
    )
    parser.add_argument("--force", action="store_true", help="replace what is not an export of this command")
    parser.add_argument("--json", action="store_true", help="print path and certificate as JSON")


def _stop(number: int = signal.SIGTERM) -> None:
    """Leave as after a signal's default, but by the way on which temporary files are removed."""
    raise SystemExit(128 + number)


def _run(arguments: argparse.Namespace) -> int:
    with on_interrupt(_stop, signals=(signal.SIGTERM,), insist=False):
        return _run_to_the_end(arguments)


def _run_to_the_end(arguments: argparse.Namespace) -> int:
    option = FORMATS[arguments.form]
    _check_quant(arguments.form, arguments.quant)
    if arguments.architecture is not None and arguments.form != "hf":
        raise UserError("--architecture goes with --hf; the other forms have one name each")
    found = resolve_model(arguments.model)
    if found.kind != "hf":
        raise UserError(
            f"{found.path} is {found.kind.upper()} already: export from the run or checkpoint it was made from"
        )
    return _export(found, arguments, option.make(arguments.quant, arguments.architecture or "own"))


def _check_quant(name: str, asked: str | None) -> None:
    known = FORMATS[name].quants
    if asked is None or asked in known:
        return
    remedy = (
        f"--{name} comes in {', '.join(known)}"
        if known
        else f"--{name} keeps the weights as they are; leave --quant out"
    )
    raise UserError(f"--quant {asked} is not known here; {remedy}")


def _export(found: ModelRef, arguments: argparse.Namespace, form: Format) -> int:
    from minicpm_export.destination import choose_destination
    from minicpm_export.pipeline import export
    from minicpm_export.source import Source
    from minicpm_export.verify.certificate import table

    out = choose_destination(form, arguments.out, model=found.name, run=found.run, force=arguments.force)
    source = Source(folder=found.path, name=found.name, run=found.run, text=arguments.text)
    with Progress() as progress:

        def show(made: Certificate) -> None:
            if not arguments.json:
                progress.finish()
                print(f"{made.file}\n{table(made)}\n")

        certificates = export(form, source, out, report=progress.update, show=show)
    if arguments.json:
        print(json.dumps({"path": str(out), "certificates": [made.to_dict() for made in certificates]}))
    else:
        print(f"wrote {out}")
    return 0


EXPORT = Command(
    help="write a model as GGUF, ONNX or a Hugging Face folder, with a certificate that it is the model",
    add_arguments=_add_arguments,
    run=_run,
)
