"""``minicpm-edge export``: a trained model in the form that another runtime reads, with proof that it is the model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from minicpm_edge.cli.command import Command
from minicpm_edge.cli.progress import Progress
from minicpm_edge.errors import UserError
from minicpm_edge.formats.resolve import ModelRef, resolve_model

if TYPE_CHECKING:
    from minicpm_export.request import Request
    from minicpm_export.verify.certificate import Certificate

GGUF_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0")
ONNX_TYPES = ("F32", "INT8")
# form → the types it comes in, the default first; HF keeps the weights as they are
QUANTS: Mapping[str, tuple[str, ...]] = {
    "gguf": ("Q4_K_M", *GGUF_TYPES),
    "onnx": ("", *ONNX_TYPES),
    "hf": ("",),
}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a run, a checkpoint or a Hugging Face folder (default: the newest run under ./runs)",
    )
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument(
        "--gguf", dest="form", action="store_const", const="gguf", help="one file for llama.cpp"
    )
    form.add_argument(
        "--onnx",
        dest="form",
        action="store_const",
        const="onnx",
        help="a folder for ONNX Runtime and the web",
    )
    form.add_argument(
        "--hf",
        dest="form",
        action="store_const",
        const="hf",
        help="a folder with the Hugging Face tensor names",
    )
    parser.add_argument(
        "--quant",
        type=str.upper,
        metavar="TYPE",
        default=None,
        help=f"GGUF: {', '.join(GGUF_TYPES)} (default Q4_K_M); ONNX: {', '.join(ONNX_TYPES)} (default both)",
    )
    parser.add_argument(
        "--architecture",
        choices=("minicpm", "granite"),
        default="minicpm",
        help="HF: the name in config.json; granite computes the same and is what transformers knows",
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


def _run(arguments: argparse.Namespace) -> int:
    quant = _quant(arguments.form, arguments.quant)
    if arguments.architecture != "minicpm" and arguments.form != "hf":
        raise UserError("--architecture goes with --hf; the other forms have one name each")
    found = resolve_model(arguments.model)
    if found.kind != "hf":
        raise UserError(
            f"{found.path} is {found.kind.upper()} already: export from the run or checkpoint it was made from"
        )
    return _export(found, arguments, quant)


def _quant(form: str, asked: str | None) -> str:
    known = QUANTS[form]
    if asked is None:
        return known[0]
    if asked not in known:
        choice = ", ".join(dict.fromkeys(name for name in known if name))
        remedy = (
            f"--{form} comes in {choice}"
            if choice
            else "--hf keeps the weights as they are; leave --quant out"
        )
        raise UserError(f"--quant {asked} is not known here; {remedy}")
    return asked


def _export(found: ModelRef, arguments: argparse.Namespace, quant: str) -> int:
    from minicpm_export.request import Request
    from minicpm_export.verify.certificate import table

    with Progress() as progress:

        def show(certificate: Certificate) -> None:
            if not arguments.json:
                progress.finish()
                print(f"{certificate.file}\n{table(certificate)}\n")

        request = Request(
            folder=found.path,
            name=found.name,
            run=found.run,
            text=arguments.text,
            report=progress.update,
            show=show,
        )
        out, certificates = _write(request, arguments, quant)
    if arguments.json:
        print(json.dumps({"path": str(out), "certificates": [made.to_dict() for made in certificates]}))
    else:
        print(f"wrote {out}")
    return 0


def _write(request: Request, arguments: argparse.Namespace, quant: str) -> tuple[Path, list[Certificate]]:
    from minicpm_export.destination import check_file, check_folder, folder_path, gguf_path

    if arguments.form == "gguf":
        from minicpm_export.gguf.job import export_gguf

        out = gguf_path(arguments.out, name=request.name, quant=quant, run=request.run)
        check_file(out, force=arguments.force)
        return out, [export_gguf(request, out, quant)]
    out = folder_path(arguments.out, name=request.name, kind=arguments.form, run=request.run)
    check_folder(out, force=arguments.force)
    if arguments.form == "hf":
        from minicpm_export.hf.job import export_huggingface

        return out, [export_huggingface(request, out, architecture=arguments.architecture)]
    from minicpm_export.onnx.job import export_onnx

    return out, export_onnx(request, out, (quant,) if quant else ONNX_TYPES)


EXPORT = Command(
    help="write a model as GGUF, ONNX or a Hugging Face folder, with a certificate that it is the model",
    add_arguments=_add_arguments,
    run=_run,
)
