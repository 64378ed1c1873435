"""How a text begins and ends: one place decides, from everything that a folder says."""

import json
import pydoc_data.topics

import pytest

from minicpm_edge.formats.generation import read_generation
from minicpm_edge.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(pydoc_data.topics.topics.values(), 300)


def settings(tokenizer, folder, config=None, generation=None):
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        if content is not None:
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return read_generation(folder, tokenizer)


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        (None, None, (2, 4)),
        ({"eos_token_id": 2}, {}, (2, 4)),
        ({"eos_token_id": [2, 100, 101]}, None, (2, 100, 101, 4)),
        ({"eos_token_id": 2}, {"eos_token_id": [100, 2]}, (100, 2, 4)),
        ({"eos_token_id": 7}, {"eos_token_id": 9}, (9, 7, 2, 4)),
        ({"eos_token_id": [True, "2", None, -1, 300, 1 << 40, 2.0]}, {"eos_token_id": {}}, (2, 4)),
    ],
)
def test_every_end_that_is_named_counts(config, generation, ends, tokenizer, tmp_path):
    assert settings(tokenizer, tmp_path, config, generation).stop_ids == ends


def test_sampling_is_read_where_it_is_of_the_right_kind(tokenizer, tmp_path):
    named = {"do_sample": True, "temperature": 0.8, "top_p": 1, "top_k": 2.5, "min_p": True, "num_beams": 3}
    got = settings(tokenizer, tmp_path, None, {**named, "transformers_version": "4.36.0"})
    assert got.sampling == {"do_sample": True, "temperature": 0.8, "top_p": 1}
    ids = {"bos_token_id": 1, "eos_token_id": [2, 4], "pad_token_id": 0}
    assert got.to_dict() == {**named, "transformers_version": "4.36.0", **ids}


def test_padding_is_the_folders_own(tokenizer, tmp_path):
    assert settings(tokenizer, tmp_path).pad_id == 0
    assert settings(tokenizer, tmp_path, {"pad_token_id": 2}).pad_id == 2
    assert settings(tokenizer, tmp_path, {"pad_token_id": 2}, {"pad_token_id": 4}).pad_id == 4
