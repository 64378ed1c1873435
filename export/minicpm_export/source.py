"""The model that is exported, and the text on which its export is verified."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from minicpm_edge.formats.checkpoint import HFStateDict, open_hf_state_dict, read_config, sha256
from minicpm_edge.formats.generation import GenerationSettings, read_generation
from minicpm_edge.model.config import ModelConfig
from minicpm_edge.text.tokenizer import Tokenizer
from minicpm_export.verify.compare import Runtime
from minicpm_export.verify.torch_runtime import TorchRuntime
from minicpm_export.verify.windows import HeldOut, held_out


@dataclass(frozen=True, kw_only=True)
class Source:
    """A Hugging Face folder as the source of an export.

    Its members raise :class:`~minicpm_edge.errors.UserError` where the folder, or the text that the user names,
    cannot be read.
    """

    folder: Path
    name: str
    """The model's name: the run's, or the folder's."""
    run: Path | None = None
    """The run the folder belongs to; its validation set is the held-out text."""
    text: Path | None = None
    """Held-out text that the user names instead."""

    @cached_property
    def config(self) -> ModelConfig:
        """The model's config."""
        return read_config(self.folder)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, with no more tokens than the model has embeddings."""
        tokenizer = Tokenizer.load(self.folder)
        tokenizer.check_fits(self.config.vocab_size, self.folder)
        return tokenizer

    @cached_property
    def generation(self) -> GenerationSettings:
        """How its text begins and ends, and the recommended sampling."""
        return read_generation(self.folder, self.tokenizer)

    def state_dict(self) -> HFStateDict:
        """The weights by Hugging Face name, checked against the config; none is read yet."""
        return open_hf_state_dict(self.folder)

    def held_out(self) -> HeldOut:
        """The text for the comparison, in windows of token ids."""
        return held_out(self.tokenizer, self.config, text=self.text, run=self.run)

    def reference(self) -> Runtime:
        """The model itself in fp32, with which every export is compared."""
        return TorchRuntime(self.folder)

    def weights_sha256(self) -> dict[str, str]:
        """SHA-256 of each file of weights, by its name."""
        files = sorted({tensor.file for tensor in self.state_dict().values()})
        return {file.name: sha256(file) for file in files}
