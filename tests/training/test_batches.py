"""Batches: a pure function of the position, with targets within documents only."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from minicpm_training.data.packed_batch import packed_batch
from minicpm_training.data.packed_dataloader import open_packed
from minicpm_training.data.tokenized_dataset import TokenizedDataset
from minicpm_training.data.writer import SetWriter

from minicpm_edge.errors import UserError
from minicpm_edge.text.tokenizer import Tokenizer


def make_set(folder, documents, masks=None, shard_tokens=1 << 20):
    folder.mkdir(parents=True)
    with SetWriter(folder, np.dtype("<u2"), shard_tokens=shard_tokens) as writer:
        for index, document in enumerate(documents):
            mask = None if masks is None else np.array(masks[index], dtype=bool)
            writer.add(np.array(document), np.array([len(document)]), mask)
    manifest = {
        "format": 1,
        "dtype": "uint16",
        "has_mask": writer.has_mask,
        "num_bytes": 1,
        "tokenizer_sha256": "x",
    }
    (folder / "manifest.json").write_text(json.dumps({**manifest, "shards": writer.shards}), encoding="utf-8")
    return TokenizedDataset.open(folder)


def batch_of_set(tokens, indices, sequence_length):
    return packed_batch([(tokens, index) for index in indices], sequence_length)


def counted(lengths):
    """Documents whose tokens count up over the whole set, so that a token says where it is from."""
    ends = np.cumsum(lengths)
    return [list(range(end - length, end)) for length, end in zip(lengths, ends, strict=True)]


def test_sequences_targets_and_documents(tmp_path):
    tokens = make_set(tmp_path / "a", counted([3, 5, 1, 7, 4]))
    batch = batch_of_set(tokens, [0, 1, 2], 6)
    assert batch.input_ids_BT.tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17]]
    assert batch.targets_BT.tolist() == [
        [1, 2, -100, 4, 5, 6],
        [7, -100, -100, 10, 11, 12],
        [13, 14, 15, -100, 17, 18],
    ]
    assert batch.cu_seqlens.tolist() == [0, 3, 6, 8, 9, 12, 16, 18]
    assert batch.cu_seqlens.dtype == torch.int32
    assert (batch.input_ids_BT.dtype, batch.targets_BT.dtype) == (torch.int64, torch.int64)
    assert batch.max_seqlen == 4
    assert batch.num_targets == 14
    assert batch.describe() == "a:0, a:1, a:2"
    assert tokens.num_sequences(6) == 3
    assert tokens.num_sequences(19) == 1
    assert tokens.num_sequences(20) == 0


def test_only_what_the_mask_says_is_a_target(tmp_path):
    masks = [[0, 0, 1, 1], [1, 0, 1]]
    tokens = make_set(tmp_path / "a", counted([4, 3]), masks)
    assert batch_of_set(tokens, [0], 6).targets_BT.tolist() == [[-100, 2, 3, -100, -100, 6]]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=8, max_size=40),
    sequence_length=st.integers(2, 40),
    shard_tokens=st.integers(1, 100),
)
def test_any_set_is_cut_into_the_same_sequences(tmp_path_factory, lengths, sequence_length, shard_tokens):
    documents = counted(lengths)
    tokens = make_set(tmp_path_factory.mktemp("set") / "a", documents, shard_tokens=shard_tokens)
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    num_sequences = tokens.num_sequences(sequence_length)
    if not num_sequences:
        return
    batch = batch_of_set(tokens, range(num_sequences), sequence_length)
    ids, targets = batch.input_ids_BT.numpy(), batch.targets_BT.numpy()
    assert ids.ravel().tolist() == list(range(num_sequences * sequence_length))
    same = document_of[ids] == document_of[ids + 1]
    assert (targets == np.where(same, ids + 1, -100)).all()
    bounds = batch.cu_seqlens.numpy()
    expected = np.flatnonzero(
        np.diff(document_of[ids.ravel()], prepend=-1).astype(bool)
        | (np.arange(ids.size) % sequence_length == 0)
    )
    assert bounds.tolist() == [*expected, ids.size]
    assert batch.max_seqlen == np.diff(bounds).max()
    assert batch.num_targets == same.sum()


@pytest.fixture
def dataloader(make_recipe, workspace):
    """Two stages of 10 steps each, of 4 sequences of 32 tokens, then of 3 of 64; micro-batches of 2 and of 1."""
    a, b = ((workspace / name).as_posix() for name in "ab")
    recipe = make_recipe(
        "schedule={warmup_tokens=128}",
        f"data.stable=[{{path='{a}', weight=0.7}}, {{path='{b}', weight=0.3}}]",
        "data.decay=[]",
        f"stages=[{{tokens=1280}}, {{tokens=1920, batch_tokens=192, sequence_length=64, sources=[{{path='{b}'}}]}}]",
    )
    return open_packed(recipe, Tokenizer.load(workspace / "tok"))


def test_any_batch_made_again_is_the_same(dataloader):
    for step in (0, 7, 9, 10, 19):
        for first, again in zip(dataloader(step), dataloader(step), strict=True):
            assert torch.equal(first.input_ids_BT, again.input_ids_BT)
            assert torch.equal(first.targets_BT, again.targets_BT)
            assert torch.equal(first.cu_seqlens, again.cu_seqlens)
            assert first.origins == again.origins


def test_stages_have_batches_and_sequences_of_their_own(dataloader):
    shapes = [[tuple(batch.input_ids_BT.shape) for batch in dataloader(step)] for step in range(20)]
    assert shapes == [[(2, 32), (2, 32)]] * 10 + [[(1, 64), (1, 64), (1, 64)]] * 10
    origins = [[name for batch in dataloader(step) for name in batch.origins] for step in range(20)]
    assert {name[0] for step in origins[:10] for name in step} == {"a", "b"}
    late = [name for step in origins[10:] for name in step]
    assert {name[0] for name in late} == {"b"} and len(set(late)) == 30
    assert dataloader(19)[0].num_tokens == 64


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_same_sequences_whatever_the_world_size(dataloader, world_size):
    whole, share = dataloader.batch(36, 4), 4 // world_size
    parts = [dataloader.batch(36 + rank * share, share) for rank in range(world_size)]
    assert torch.equal(torch.cat([part.input_ids_BT for part in parts]), whole.input_ids_BT)
    assert torch.equal(torch.cat([part.targets_BT for part in parts]), whole.targets_BT)
    assert sum((part.origins for part in parts), ()) == whole.origins
    assert sum(part.num_targets for part in parts) == whole.num_targets


def test_a_batch_moves_between_devices(dataloader):
    batch = dataloader(3)[0]
    moved = batch.to(torch.device("meta"))
    assert moved.input_ids_BT.device.type == moved.cu_seqlens.device.type == "meta"
    assert moved.origins == batch.origins


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "is no prepared set"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "is not a tokenized dataset's manifest"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": 99}'), "of format 99"),
        (lambda folder: (folder / "tokens-00000.bin").write_bytes(b"x"), "is 1 bytes long, not 40"),
        (lambda folder: (folder / "tokens-00000.bin").unlink(), "is missing"),
        (lambda folder: (folder / "documents-00000.npy").write_bytes(b"x"), "missing or damaged"),
        (
            lambda folder: np.save(folder / "documents-00000.npy", np.array([0, 30])),
            "does not fit its tokens",
        ),
        (
            lambda folder: np.save(folder / "documents-00000.npy", np.array([0, 5, 5])),
            "does not fit its tokens",
        ),
    ],
)
def test_a_damaged_set_is_named(tmp_path, damage, message):
    make_set(tmp_path / "a", counted([3, 5, 1, 7, 4]))
    damage(tmp_path / "a")
    with pytest.raises(UserError, match=message):
        TokenizedDataset.open(tmp_path / "a")
