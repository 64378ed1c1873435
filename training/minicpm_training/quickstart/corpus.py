"""A corpus that every machine has: Python's own standard library, read as text and never imported.

- ``source``: the modules' source code. Stage 1, coarse.
- ``docs``: each docstring under its qualified name and signature, and the language reference of
  ``pydoc_data.topics``. The high-quality set of the decay stage.
- ``chats``: the same docs as questions and answers.

One module in eight is held out whole, source and docs, for validation (``docs.valid``); one question in
forty about the other modules is held out too (``questions``), with the true answer beside it.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

HELD_OUT_MODULES, HELD_OUT_QUESTIONS = 8, 40
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "pydoc_data"}
)
HEADING = re.compile(r"^[*=~^-]{3,}$", re.MULTILINE)
MIN_DOC_CHARACTERS, MAX_ANSWER_CHARACTERS = 60, 400

# Several ways to ask the same thing, so that the model learns the question and not one wording.
DEFINITION_QUESTIONS = (
    "What does {name} do?",
    "What is {name} for?",
    "Explain {name}.",
    "Tell me about Python's {name}.",
)
SIGNATURE_QUESTIONS = ("How do I call {name}?", "What is the signature of {name}?")
TOPIC_QUESTIONS = (
    "What does the Python language reference say about {name}?",
    "Explain the topic {name} in Python.",
)


@dataclass(frozen=True, kw_only=True)
class Doc:
    """One documented thing: its qualified name, signature (functions) and cleaned text."""

    name: str
    is_topic: bool = False  # of the language reference, not of a module
    signature: str
    text: str

    @property
    def document(self) -> str:
        """The doc as one document: a heading, the signature, the text."""
        signature = f"{self.signature}\n\n" if self.signature else ""
        return f"# {self.name}\n\n{signature}{self.text}\n"

    @property
    def answer(self) -> str:
        """The first paragraph on one line, at most 400 characters and whole sentences where there are any."""
        paragraphs = re.split(r"\n\s*\n", self.text.strip())
        proper = [text for text in paragraphs if not HEADING.search(text)] or paragraphs
        paragraph = " ".join(proper[0].split())
        if len(paragraph) <= MAX_ANSWER_CHARACTERS:
            return paragraph
        cut = paragraph[:MAX_ANSWER_CHARACTERS]
        return cut[: cut.rfind(". ") + 1] or cut


def write_corpus(folder: Path) -> dict[str, int]:
    """Write the corpus as JSON lines into ``folder`` (existing, empty); returns documents by file name."""
    counts: dict[str, int] = {}
    names = ("source", "docs", "docs.valid", "chats", "questions")
    streams = {name: (folder / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") for name in names}
    try:
        for name, entry in _entries():
            _write(streams[name], entry)
            counts[name] = counts.get(name, 0) + 1
    finally:
        for stream in streams.values():
            stream.close()
    return counts


def _write(stream: TextIO, entry: dict[str, object]) -> None:
    stream.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _entries() -> Iterator[tuple[str, dict[str, object]]]:
    for module, text in _modules():
        held_out = _bucket(module.split(".")[0], HELD_OUT_MODULES)
        if not held_out:
            yield "source", {"text": text}
        for doc in _docs(module, text):
            yield from _doc_entries(doc, held_out)
    for doc in _topics():
        yield from _doc_entries(doc, _bucket(doc.name, HELD_OUT_MODULES))


def _doc_entries(doc: Doc, held_out: bool) -> Iterator[tuple[str, dict[str, object]]]:
    yield "docs.valid" if held_out else "docs", {"text": doc.document}
    if held_out:
        return
    for question, answer in _questions(doc):
        if _bucket(question, HELD_OUT_QUESTIONS):
            yield "questions", {"question": question, "answer": answer}
        else:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            yield "chats", {"messages": messages}


def _questions(doc: Doc) -> Iterator[tuple[str, str]]:
    for form in TOPIC_QUESTIONS if doc.is_topic else DEFINITION_QUESTIONS:
        yield form.format(name=doc.name), doc.answer
    if doc.signature:
        for form in SIGNATURE_QUESTIONS:
            yield form.format(name=doc.name), f"{doc.signature} — {doc.answer}"


def _bucket(name: str, one_in: int) -> bool:
    """True for one name in ``one_in``, the same on every machine and every Python."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % one_in == 0


def _modules() -> Iterator[tuple[str, str]]:
    """(dotted name, source) of every module of the standard library, in name order."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.intersection(parts) or parts[0].startswith("config-"):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # a few files of codecs' own data are not UTF-8
        yield ".".join(part for part in parts if part != "__init__") or parts[0], text


def _docs(module: str, text: str) -> Iterator[Doc]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in old modules
            tree = ast.parse(text)
    except SyntaxError:
        return
    yield from _node_docs(module, tree)


def _node_docs(
    name: str, node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
) -> Iterator[Doc]:
    docstring = ast.get_docstring(node)
    if docstring and len(docstring) >= MIN_DOC_CHARACTERS:
        yield Doc(name=name, signature=_signature(name, node), text=inspect.cleandoc(docstring))
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and child.name[0] != "_":
            yield from _node_docs(f"{name}.{child.name}", child)


def _signature(name: str, node: ast.AST) -> str:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return ""
    return f"{name}({ast.unparse(node.args)})"


def _topics() -> Iterator[Doc]:
    """The language reference that ``help()`` shows; absent from some trimmed installations."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name, text in sorted(topics.items()):
        yield Doc(name=name, is_topic=True, signature="", text=text.strip())
