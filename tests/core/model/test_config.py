"""Configs: the paper's counts, the families that are read, and what is refused."""

import math

import pytest

from minicpm_edge.errors import UserError
from minicpm_edge.model.config import ModelConfig, RopeScaling
from minicpm_edge.model.presets import PRESETS, preset
from minicpm_edge.model.transformer import count_parameters

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("minicpm-1.2b", 1_247_442_432),
        ("minicpm-2.4b", 2_442_057_984),
    ],
)
def test_parameter_counts_equal_the_papers_exactly(name, parameters):
    assert count_parameters(preset(name)) == parameters


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("9m", 0.009),
        ("30m", 0.036),
        ("70m", 0.066),
        ("0.1b", 0.109),
        ("0.17b", 0.166),
        ("0.2b", 0.241),
        ("0.5b", 0.499),
    ],
)
def test_wind_tunnel_sizes_round_to_the_papers_table_8(name, billions):
    assert round(count_parameters(preset(name)) / 1e9, 3) == pytest.approx(billions, abs=0.0011)


def test_mixture_of_experts_counts():
    config = preset("minicpm-moe-8x2b")
    assert count_parameters(config) / 1e9 == pytest.approx(13.590, abs=0.0005)
    assert count_parameters(config, active=True) / 1e9 == pytest.approx(4.035, abs=0.0005)


def test_a_config_survives_its_own_json():
    for config in PRESETS.values():
        assert ModelConfig.from_dict(config.to_dict()) == config


def test_a_llama_is_a_minicpm_with_neutral_scales():
    config = ModelConfig.from_dict(LLAMA)
    assert config.scale_emb == 1.0
    assert config.residual_scale == pytest.approx(1.0)
    assert config.logit_scale == 1.0
    assert not config.tie_word_embeddings
    assert config.head_dim == 16


def test_granite_multipliers_map_to_ours():
    entries = LLAMA | {
        "architectures": ["GraniteForCausalLM"],
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.7,
        "logits_scaling": 4.0,
        "attention_multiplier": 16**-0.5,
    }
    config = ModelConfig.from_dict(entries)
    assert (config.scale_emb, config.residual_scale, config.logit_scale) == pytest.approx((12.0, 0.7, 0.25))


def test_llama3_rope_scaling_is_read_and_written():
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = ModelConfig.from_dict(LLAMA | {"rope_scaling": scaling})
    assert config.rope_scaling == RopeScaling(kind="llama3", factor=8.0)
    assert config.to_dict()["rope_scaling"] == scaling


FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
# As MiniCPM4, MiniCPM-2B-128K and MiniCPM-S publish them.
PUBLISHED = {
    "longrope": {
        "rope_scaling": {"rope_type": "longrope", **FACTORS, "original_max_position_embeddings": 32768},
        "max_position_embeddings": 32768,
    },
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 65536},
    "fatrelu": {"hidden_act": "fatrelu", "hidden_act_param": 0.01},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_the_family_publishes_is_read_and_written(name):
    config = ModelConfig.from_dict(LLAMA | PUBLISHED[name])
    assert ModelConfig.from_dict(config.to_dict()) == config
    expected = PUBLISHED[name].get("rope_scaling")
    written = config.to_dict()
    if expected:
        assert expected.items() <= written["rope_scaling"].items()
    else:
        assert PUBLISHED[name].items() <= written.items()


def test_longrope_attention_factor_is_the_papers():
    def factor(**changes):
        scaling = {"rope_type": "longrope", **FACTORS, "original_max_position_embeddings": 4096, **changes}
        entries = {"rope_scaling": scaling, "max_position_embeddings": 131072}
        return ModelConfig.from_dict(LLAMA | entries).attention_factor

    assert factor() == pytest.approx((1 + math.log(32) / math.log(4096)) ** 0.5)
    assert factor(factor=8.0) == pytest.approx((1 + math.log(8) / math.log(4096)) ** 0.5)
    assert factor(attention_factor=1.25, factor=8.0) == 1.25
    assert factor(original_max_position_embeddings=131072) == 1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_scaling": {"type": "longrope", **FACTORS}}, "original_max_position_embeddings is missing"),
        (
            {
                "rope_scaling": {
                    "type": "longrope",
                    "short_factor": [1.0] * 7,
                    "long_factor": [1.0] * 8,
                    "original_max_position_embeddings": 8,
                }
            },
            "needs 8 short",
        ),
        ({"rope_scaling": {"type": "dynamic"}}, "factor is None"),
        ({"rope_scaling": {"type": "dynamic", "factor": "4"}}, "factor is '4'"),
        ({"rope_scaling": "dynamic"}, "wrong kind"),
        (
            {"rope_scaling": {"type": "longrope", **FACTORS, "original_max_position_embeddings": 1}},
            "original_max_position_embeddings is 1",
        ),
        ({"hidden_act": "fatrelu", "hidden_act_param": -1}, "hidden_act_param is -1"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM"),
        ({"architectures": ["BertModel"]}, "BertModel"),
        ({"architectures": None}, "architecture None"),
        ({"architectures": [[]]}, r"architecture \[\]"),
        ({"architectures": [{"a": 1}]}, "architecture {'a': 1}"),
        ({"architectures": {"a": 1}}, "architecture {'a': 1}"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"hidden_size": "64"}, "wrong kind"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"vocab_size": 1 << 40}, "vocab_size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers|wrong kind"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_name(change, words):
    with pytest.raises(UserError, match=words):
        ModelConfig.from_dict(LLAMA | change)


def test_a_missing_key_is_named():
    with pytest.raises(UserError, match="vocab_size"):
        ModelConfig.from_dict({key: value for key, value in LLAMA.items() if key != "vocab_size"})


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match=r"minicpm-1\.2b"):
        preset("minicpm-1.3b")
