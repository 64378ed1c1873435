"""The tokenizer: byte-level BPE, the same ids in `tokenizers`, `transformers` and llama.cpp.

Text is split by the Llama-3 pattern, which llama.cpp knows as ``llama-bpe``, and each piece is merged as bytes, so
every string has tokens and comes back unchanged. Published SentencePiece models and other `tokenizers` files of
the byte-level or byte-fallback kind load too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from minicpm_edge.errors import UserError
from minicpm_edge.json_file import read_json
from minicpm_edge.lfs import refuse_pointer
from minicpm_edge.text.added_tokens import add_declared, declared_tokens
from minicpm_edge.text.chatml import CHATML_TEMPLATE, IM_END, IM_START
from minicpm_edge.text.sentencepiece import convert

# Llama-3's pattern, with the contractions spelt out as in llama.cpp: `(?i:'s)` would also match a long s (U+017F)
# in some engines and not in others.
SPLIT_PATTERN = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
SPECIAL_TOKENS = (PAD, BOS, EOS, IM_START, IM_END)
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256
MAX_VOCAB_SIZE = 1 << 20
# A longer token would be a row of dashes or spaces that occurs in one kind of file and wastes its embedding.
MAX_TOKEN_BYTES = 32
JSON_FILE, CONFIG_FILE, SENTENCEPIECE_FILE = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"


class Tokenizer:
    """Text to ids and back. Immutable, and safe to share between threads.

    ``chat_template`` is the Jinja template for conversations, or None where the loaded folder brings none.
    """

    def __init__(
        self, definition: str, config: Mapping[str, Any], *, sentencepiece: bytes | None = None
    ) -> None:
        """``definition`` is the text of a tokenizer.json, ``config`` the content of its tokenizer_config.json.

        ``sentencepiece`` is the tokenizer.model that came with them: kept for exporters, which need its scores.
        """
        self.sentencepiece = sentencepiece
        self._definition = definition
        self._config = dict(config)
        try:
            self._backend: Any = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:
            # What `tokenizers` raises for any file that it cannot read.
            raise UserError(f"this is not a tokenizer that can be read: {error}") from error
        self._backend.no_padding()
        self._backend.no_truncation()
        # Look-alikes of special tokens are text; see `encode`.
        self._backend.encode_special_tokens = True
        added = self._backend.get_added_tokens_decoder()
        self._added: dict[int, str] = {index: token.content for index, token in added.items()}
        #: The special tokens, text to id.
        self.special_tokens: dict[str, int] = {
            token.content: index for index, token in sorted(added.items()) if token.special
        }
        self.bos_token = self._named_token("bos_token", BOS)
        self.eos_token = self._named_token("eos_token", EOS)
        # Some files do not mark them.
        for token in (self.bos_token, self.eos_token):
            self.special_tokens.setdefault(token, self.vocab[token])
        self.chat_template: str | None = self._config.get("chat_template")

    # --- making, reading and writing ---

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn ``vocab_size`` tokens (special tokens and the 256 bytes included) from ``texts``.

        Raises:
            UserError: when ``vocab_size`` is out of range or more than the texts can give.
        """
        if not MIN_VOCAB_SIZE < vocab_size <= MAX_VOCAB_SIZE:
            raise UserError(
                f"vocabulary size {vocab_size} is out of range: it takes {MIN_VOCAB_SIZE} for the bytes and special "
                f"tokens alone; choose {MIN_VOCAB_SIZE + 1} to {MAX_VOCAB_SIZE}"
            )
        backend = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            max_token_length=MAX_TOKEN_BYTES,
            show_progress=False,
        )
        backend.train_from_iterator((_valid_unicode(text) for text in texts), trainer)
        reached = backend.get_vocab_size()
        if reached < vocab_size:
            raise UserError(
                f"the text gives only {reached} different tokens, {vocab_size} were asked for: "
                f"give more text, or ask for a vocabulary of {reached}"
                if reached > MIN_VOCAB_SIZE
                else "the text is too short to learn a single token from: give more text"
            )
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
        )
        return cls(backend.to_str(pretty=True), _default_config())

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a folder, a ``tokenizer.json`` or a SentencePiece ``tokenizer.model``.

        Raises:
            UserError: naming the path, where there is no tokenizer or a broken one.
        """
        path = Path(path)
        if not path.exists():
            raise UserError(f"no tokenizer at {path}: the path does not exist")
        folder = path if path.is_dir() else path.parent
        if path.is_dir():
            found = [path / name for name in (JSON_FILE, SENTENCEPIECE_FILE) if (path / name).is_file()]
            if not found:
                raise UserError(
                    f"no tokenizer in {path}: it has neither {JSON_FILE} nor {SENTENCEPIECE_FILE}"
                )
            path = found[0]
        config = _read_config(folder)
        model = path if path.suffix == ".model" else folder / SENTENCEPIECE_FILE
        sentencepiece = model.read_bytes() if model.is_file() else None
        declared = declared_tokens(folder, config)
        for file in (path, model):
            refuse_pointer(file)
        if path == model:
            assert sentencepiece is not None
            special = {text for text, token in declared.items() if token["special"]}
            definition, defaults = convert(sentencepiece, path, special=special)
            config = {**defaults, **config}
            declared = declared_tokens(folder, config)
        else:
            try:
                definition = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not a tokenizer.json: it is not UTF-8 text") from error
        try:
            loaded = cls(definition, config, sentencepiece=sentencepiece)
            if (complete := add_declared(definition, declared)) != definition:
                loaded = cls(complete, config, sentencepiece=sentencepiece)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        for text, token in declared.items():
            if loaded.vocab.get(text, token.get("id")) != token.get("id", loaded.vocab.get(text)):
                raise UserError(
                    f"{folder}: the token {text!r} has the id {token['id']} in its settings and "
                    f"{loaded.vocab[text]} in {path.name}; they do not belong together"
                )
        return loaded

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json`` into ``folder`` (made if missing)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = json.dumps(self._config, ensure_ascii=False, indent=2) + "\n"
        # Bytes, so that Windows does not change the newlines: the file's hash is the tokenizer's identity.
        (folder / JSON_FILE).write_bytes(self._definition.encode())
        (folder / CONFIG_FILE).write_bytes(config.encode())
        if self.sentencepiece is not None:
            (folder / SENTENCEPIECE_FILE).write_bytes(self.sentencepiece)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of ``tokenizer.json``: two tokenizers with the same value give the same ids."""
        return hashlib.sha256(self._definition.encode()).hexdigest()

    # --- text and ids ---

    def encode(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """Ids of ``text``. Look-alikes of special tokens in it are plain text unless ``special`` is set."""
        backend = self._special_backend if special else self._backend
        ids: list[int] = backend.encode_batch_fast([_valid_unicode(text)], add_special_tokens=False)[0].ids
        return [self.bos_id, *ids] if bos else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, as :meth:`encode` gives them; much faster, on all cores that `tokenizers` may use."""
        try:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:
            # What `tokenizers` raises for a string with half a surrogate pair.
            encodings = self._backend.encode_batch_fast(
                [_valid_unicode(text) for text in texts], add_special_tokens=False
            )
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text of ``ids``; bytes that are not UTF-8 become U+FFFD. Special tokens show only with ``special``.

        Leading spaces stay: ``decode(encode(text)) == text`` for every valid string.
        """
        ids = list(ids)
        text = b"".join(self.token_bytes(index, special=special) for index in ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.adds_space and ids else text

    def token_bytes(self, index: int, *, special: bool = False) -> bytes:
        """The bytes that token ``index`` stands for: what a stream appends. Special tokens are empty by default.

        Raises:
            UserError: for an id outside the vocabulary.
        """
        if index in self._special_ids and not special:
            return b""
        if not 0 <= index < len(self._bytes):
            raise UserError(f"token id {index} is not in the vocabulary of {self.vocab_size}")
        return self._bytes[index]

    # --- what is in it ---

    @cached_property
    def vocab_size(self) -> int:
        """One more than the greatest id."""
        ids: Iterable[int] = self._backend.get_vocab(with_added_tokens=True).values()
        return max(ids) + 1

    def check_fits(self, num_embeddings: int, folder: Path) -> None:
        """Whether each token has an embedding; a model may have more of them (padded vocabularies).

        Raises:
            UserError: naming the folder, where the tokenizer is of another model.
        """
        if self.vocab_size > num_embeddings:
            raise UserError(
                f"{folder}: the tokenizer has {self.vocab_size} tokens and the model only {num_embeddings}; "
                "they do not belong together"
            )

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Each token as its file spells it (byte-level tokens in the GPT-2 alphabet), to its id."""
        return dict(self._backend.get_vocab(with_added_tokens=True))

    @property
    def definition(self) -> dict[str, Any]:
        """The content of ``tokenizer.json``; exporters read merges and kinds from it."""
        content: dict[str, Any] = json.loads(self._definition)
        return content

    @cached_property
    def bos_id(self) -> int:
        """Id of the token that begins each document."""
        return self.vocab[self.bos_token]

    @cached_property
    def eos_id(self) -> int:
        """Id of the token that ends each document."""
        return self.vocab[self.eos_token]

    @cached_property
    def im_end_id(self) -> int:
        """Id of the token that ends a chat turn; the end of text where there is no such token."""
        return self.vocab.get(IM_END, self.eos_id)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids at which generation ends."""
        return frozenset({self.eos_id, self.im_end_id})

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether tokens are spelt in the byte alphabet of GPT-2 (else SentencePiece: ``▁`` and ``<0x0A>``)."""
        return '"ByteLevel"' in json.dumps([self.definition["pre_tokenizer"], self.definition["decoder"]])

    @cached_property
    def adds_bos(self) -> bool:
        """Whether this tokenizer begins every text with :attr:`bos_token` (llama.cpp's ``add_bos_token``)."""
        ids: list[int] = self._backend.encode("a", add_special_tokens=True).ids
        return ids[:1] == [self.bos_id]

    @cached_property
    def adds_space(self) -> bool:
        """Whether encoding puts a space before the text, as SentencePiece does and decoding takes away."""
        return not self.is_byte_level and self.decode_raw(self.encode("a")).startswith(" ")

    def decode_raw(self, ids: Iterable[int]) -> str:
        """Text of ``ids`` as a continuation of other text: a leading space of SentencePiece stays."""
        return b"".join(self.token_bytes(index) for index in ids).decode("utf-8", "replace")

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.special_tokens.values())

    @cached_property
    def _special_backend(self) -> Any:
        backend: Any = tokenizers.Tokenizer.from_str(self._definition)
        backend.no_padding()
        backend.no_truncation()
        return backend

    @cached_property
    def _bytes(self) -> list[bytes]:
        spell = _byte_level_bytes if self.is_byte_level else _sentencepiece_bytes
        table = [b""] * self.vocab_size
        for token, index in self.vocab.items():
            table[index] = self._added[index].encode() if index in self._added else spell(token)
        return table

    def _named_token(self, key: str, default: str) -> str:
        value = self._config.get(key) or default
        token = value["content"] if isinstance(value, dict) else value
        if self._backend.token_to_id(token) is None:
            raise UserError(f"the tokenizer has no {key}: {token!r} is not in its vocabulary")
        self._config.setdefault(key, token)
        return str(token)


def _default_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": [IM_START, IM_END],
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHATML_TEMPLATE,
    }


def _read_config(folder: Path) -> dict[str, Any]:
    """The tokenizer's settings, with the chat template under ``chat_template`` wherever the folder keeps it."""
    config = read_json(folder / CONFIG_FILE, missing_ok=True)
    template = config.get("chat_template")
    # The older form with several named templates.
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    beside = folder / "chat_template.jinja"
    if beside.is_file():
        template = beside.read_text(encoding="utf-8", errors="replace")
    config["chat_template"] = template
    return config


def _valid_unicode(text: str) -> str:
    """``text`` with half surrogate pairs (JSON can spell them, UTF-8 cannot) as U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def _byte_alphabet() -> Iterator[tuple[str, int]]:
    """GPT-2's spelling of bytes as visible characters: printable Latin-1 as itself, the others from U+0100 on."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown]
    for byte in shown:
        yield chr(byte), byte
    for position, byte in enumerate(hidden):
        yield chr(0x100 + position), byte


_ALPHABET = dict(_byte_alphabet())


def _byte_level_bytes(token: str) -> bytes:
    return bytes(_ALPHABET[character] for character in token if character in _ALPHABET)


def _sentencepiece_bytes(token: str) -> bytes:
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()
