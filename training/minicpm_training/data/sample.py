"""A bounded sample of text for training a tokenizer, spread evenly over all sources and each one's length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from minicpm_edge.cli.progress import Progress
from minicpm_edge.errors import UserError
from minicpm_training.data.documents import Document, documents
from minicpm_training.data.encoder import cut
from minicpm_training.data.sources import find_sources, read_chunks

PIECE_CHARACTERS = 1 << 16
MAX_PIECES = 4  # of one document: a dictionary of 40 MB must not be the whole sample


@dataclass(kw_only=True)
class Sample:
    """Texts of the sources ``names``, about ``max_bytes`` in all; a source that has less leaves its share unused.

    Every source is read once from end to end and gives a chunk whenever it is behind its share of what has been
    read, so that the sample comes from everywhere in it.
    """

    names: Sequence[str]
    field: str
    max_bytes: int
    num_bytes: int = 0
    num_documents: int = 0

    def texts(self, progress: Progress) -> Iterator[str]:
        """The sample. Raises UserError when there is no text in any source."""
        sources = find_sources(self.names)
        share = self.max_bytes / max(1, len(sources))
        taken = [0] * len(sources)
        problem = ""
        for chunk in read_chunks(sources, self.field):
            pace = share if sources[chunk.source].dataset else share * chunk.done
            if taken[chunk.source] > pace:
                continue
            for document in documents(chunk, self.field):
                if not isinstance(document, Document):
                    problem = problem or f": {document}"
                    continue
                pieces = list(cut(document.text, PIECE_CHARACTERS))
                pieces = pieces[:: -(-len(pieces) // MAX_PIECES)]
                size = sum(len(piece.encode()) for piece in pieces)
                taken[chunk.source] += size
                self.num_bytes += size
                self.num_documents += 1
                yield from pieces
                if taken[chunk.source] > share:
                    break
            progress.update(f"reading  {chunk.done:4.0%}  {self.num_bytes / 1e6:,.1f} MB of text")
        if not self.num_documents:
            raise UserError(f"no text in {', '.join(self.names)}{problem}")
        progress.finish(f"read {self.num_bytes / 1e6:,.1f} MB of text; learning the vocabulary …")
