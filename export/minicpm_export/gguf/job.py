"""From a Hugging Face folder to a certified GGUF: write, quantise, compare, put in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from minicpm_edge.atomic import atomic_file
from minicpm_edge.formats.checkpoint import read_config, sha256
from minicpm_edge.text.tokenizer import Tokenizer
from minicpm_export.destination import rejected
from minicpm_export.gguf.quantize import fallbacks, quantize, tensor_types
from minicpm_export.gguf.writer import FLOAT_TYPES, write_gguf
from minicpm_export.request import Request
from minicpm_export.verify import certificate
from minicpm_export.verify.certificate import THRESHOLDS, Certificate, Check, Runtime, compare
from minicpm_export.verify.llama_runtime import LlamaRuntime
from minicpm_export.verify.torch_runtime import TorchRuntime
from minicpm_export.verify.windows import Window, built_in_text, held_out

# Strings on which tokenizers differ most readily; the long list is in the tests.
NASTY = (
    "",
    "  a  b\t\n\n c",
    "naïve café 東京 ٣ 👩‍👩‍👧",
    "<s></s><|im_end|>",
    "x = 12345.678e-9 # don't",
    "\r\n\0\x7f",
)


def export_gguf(request: Request, out: Path, quant: str) -> Certificate:
    """Write ``out`` and its certificate.

    Raises:
        UserError: for a model that cannot be exported, and for an export that fails its certificate (it is put
            aside; an earlier file at ``out`` stays).
    """
    folder = request.folder
    tokenizer = Tokenizer.load(folder)
    text = held_out(tokenizer, read_config(folder), text=request.text, run=request.run)
    with atomic_file(out) as temporary, _written(request, temporary, quant) as full:
        reference = TorchRuntime(folder)
        checks = [
            _check(quant, reference, temporary, text.windows, quant, request),
            _check(
                "… with llama.cpp's F16 cache",
                reference,
                temporary,
                text.windows[:1],
                quant,
                request,
                defaults=True,
            ),
        ]
        if full is not None:  # with tight limits: a wrong map cannot hide behind rounding
            checks.append(_check("before quantising", reference, full, text.windows[:1], "F32", request))
        made = Certificate(
            file=out.name,
            quant=quant,
            num_bytes=temporary.stat().st_size,
            sha256={out.name: sha256(temporary)},
            model=request.name,
            model_sha256=request.model_sha256(),
            held_out=text.name,
            checks=tuple(checks),
            other_failures=tuple(_tokenizer_failures(temporary, tokenizer)),
            notes=tuple(fallbacks(tensor_types(temporary), quant)),
        )
        request.show(made)
        if not made.passed:
            raise rejected(temporary, out, made)
    certificate.write(out.parent, made)
    return made


@contextmanager
def _written(request: Request, out: Path, quant: str) -> Iterator[Path | None]:
    """Write the file; yields the unquantised one it was made from, which is gone afterwards, or None."""
    if quant in FLOAT_TYPES:
        write_gguf(request.folder, out, quant=quant, name=request.name, report=request.report)
        yield None
        return
    full = out.with_name(out.name + ".f32")  # named so that atomic_file clears it away after a kill
    try:
        write_gguf(request.folder, full, quant="F32", name=request.name, report=request.report)
        request.report(f"quantising to {quant}")
        quantize(full, out, quant)
        yield full
    finally:
        full.unlink(missing_ok=True)


def _check(
    what: str,
    reference: Runtime,
    file: Path,
    windows: Sequence[Window],
    limits: str,
    request: Request,
    *,
    defaults: bool = False,
) -> Check:
    length = max(len(window.ids) for window in windows)
    with LlamaRuntime(file, context_length=length, defaults=defaults) as runtime:
        measures = compare(reference, runtime, windows, request.report)
        thresholds = THRESHOLDS["F16" if defaults and limits == "F32" else limits]
        return Check(what=what, runtime=runtime.name, measures=measures, thresholds=thresholds)


def _tokenizer_failures(file: Path, tokenizer: Tokenizer) -> Iterator[str]:
    """Strings that llama.cpp's own tokenizer, read from the file, splits differently."""
    with LlamaRuntime(file, context_length=32) as runtime:
        for text in (*NASTY, built_in_text()):
            if runtime.tokenize(text) != tokenizer.encode(text):
                yield f"llama.cpp's tokenizer gives other ids than ours for {text[:40]!r}"
