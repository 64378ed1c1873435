"""The decoder against an oracle, its cache, and its document bounds."""

import dataclasses
import itertools

import pytest
import torch
from torch.nn import functional as F

from minicpm_edge.errors import UserError
from minicpm_edge.formats.checkpoint import hf_state_dict, load_checkpoint, save_checkpoint
from minicpm_edge.model.attention import KVCache
from minicpm_edge.model.config import ModelConfig, RopeScaling
from minicpm_edge.model.transformer import MiniCPM

TINY = ModelConfig(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


def make_model(config=TINY, seed=0):
    model = MiniCPM(config)
    model.init_weights(seed=seed)
    with torch.no_grad():  # norms of one would hide a missing or doubled norm
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.linspace(-0.3, 0.3, parameter.numel()))
    return model.eval()


def random_ids(*shape, seed=1):
    return torch.randint(0, TINY.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_the_granite_oracle(tied):
    transformers = pytest.importorskip("transformers")
    # At the base width, where the logits' factor is 1: at TINY's 64 it is 4, and so is float32's own rounding.
    config = dataclasses.replace(
        TINY, tie_word_embeddings=tied, hidden_size=256, intermediate_size=640, head_dim=64
    )
    model = make_model(config)
    oracle_config = transformers.GraniteConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=tied,
        embedding_multiplier=config.scale_emb,
        residual_multiplier=config.residual_scale,
        logits_scaling=1 / config.logit_scale,
        attention_multiplier=config.head_dim**-0.5,
    )
    oracle = transformers.GraniteForCausalLM(oracle_config).eval()
    missing = oracle.load_state_dict(hf_state_dict(model), strict=False)
    assert missing.missing_keys == (["lm_head.weight"] if tied else [])
    oracle.tie_weights()
    ids = random_ids(2, 37)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), oracle(ids).logits, atol=1e-5, rtol=1e-5)


SHORT = tuple(1.0 + 0.05 * index for index in range(8))
LONG = tuple(1.0 + 0.7 * index for index in range(8))
LONGROPE = RopeScaling(
    kind="longrope", short_factor=SHORT, long_factor=LONG, original_max_position_embeddings=128
)
SCALINGS = {
    "none": None,
    "linear": RopeScaling(kind="linear", factor=2.0),
    "llama3": RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=32),
    "longrope": LONGROPE,
    "longrope with factor": dataclasses.replace(LONGROPE, factor=4.0),
    "longrope with attention_factor": dataclasses.replace(LONGROPE, attention_factor=1.3),
    "dynamic": RopeScaling(kind="dynamic", factor=4.0),
}


# Shorter than what longrope was trained for, longer than that, and longer than the context.
@pytest.mark.parametrize("length", [100, 200, 400])
@pytest.mark.parametrize("name", SCALINGS)
def test_a_llama_folder_loads_with_equal_logits(tmp_path, name, length):
    scaling = SCALINGS[name]
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_scaling=scaling.to_dict() if scaling else None,
    )
    torch.manual_seed(0)
    oracle = transformers.LlamaForCausalLM(config).eval()
    oracle.save_pretrained(tmp_path)
    model = load_checkpoint(tmp_path)
    ids = random_ids(1, length)
    with torch.no_grad():
        expected = oracle(ids).logits
        torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=1e-5)
        # With a cache the longest text that it may hold decides: here just this one, token by token at the end.
        cache = KVCache(model.config, 1, length)
        parts = [
            model(ids[:, a:b], cache=cache)
            for a, b in ((0, length - 2), (length - 2, length - 1), (length - 1, length))
        ]
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=1e-5)


def test_longrope_of_a_text_does_not_change_while_its_cache_fills():
    config = dataclasses.replace(TINY, max_position_embeddings=256, rope_scaling=LONGROPE)
    model, ids = make_model(config), random_ids(1, 140)
    with torch.no_grad():
        cache = KVCache(config, 1, 140)
        parts = [model(ids[:, :100], cache=cache), model(ids[:, 100:], cache=cache)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), atol=1e-5, rtol=1e-5)


def test_fatrelu_is_the_identity_above_its_threshold():
    """MiniCPM-S, against the published definition."""
    config = dataclasses.replace(TINY, hidden_act="fatrelu", hidden_act_param=0.02)
    feed_forward = make_model(config).layers[0].feed_forward
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    gate, up = (x @ feed_forward.gate_up.weight.T).chunk(2, dim=-1)
    kept = torch.where(gate > 0.02, gate, torch.zeros_like(gate))
    assert 0.2 < (kept != 0).float().mean() < 0.6
    torch.testing.assert_close(feed_forward(x), (kept * up) @ feed_forward.down.weight.T)


def test_a_cache_gives_the_logits_of_the_full_pass():
    model, ids = make_model(), random_ids(2, 30)
    with torch.no_grad():
        full = model(ids)
        cache = KVCache(TINY, 2, 30)
        pieces = [
            model(ids[:, start:end], cache=cache) for start, end in [(0, 11), (11, 12), (12, 20), (20, 30)]
        ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, atol=5e-5, rtol=1e-5)


def test_a_truncated_cache_goes_on_as_if_it_had_never_been_longer():
    model, ids = make_model(), random_ids(1, 20)
    with torch.no_grad():
        cache = KVCache(TINY, 1, 32)
        model(ids, cache=cache)
        cache.truncate(8)
        torch.testing.assert_close(model(ids[:, 8:], cache=cache), model(ids)[:, 8:], atol=1e-5, rtol=1e-5)


def test_a_full_cache_says_so():
    with pytest.raises(ValueError, match="holds 4 tokens"):
        make_model()(random_ids(1, 5), cache=KVCache(TINY, 1, 4))


def test_packed_documents_do_not_see_each_other():
    model, ids = make_model(), random_ids(2, 16)
    bounds = torch.tensor([0, 5, 6, 16, 29, 32], dtype=torch.int32)
    with torch.no_grad():
        packed = model(ids, cu_seqlens=bounds).flatten(0, 1)
        flat = ids.flatten()
        alone = [model(flat[None, a:b])[0] for a, b in itertools.pairwise(bounds.tolist())]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_loss_is_the_cross_entropy_of_the_logits():
    model, ids = make_model(), random_ids(2, 16)
    targets = random_ids(2, 16, seed=2)
    targets[0, 3] = targets[1, 15] = -100
    loss = model.loss(ids, targets, z_loss=1e-3)
    logits = model(ids).flatten(0, 1)
    counted = targets.flatten() != -100
    expected = F.cross_entropy(logits, targets.flatten(), reduction="sum")
    z_term = 1e-3 * logits[counted].logsumexp(-1).square().sum()
    assert loss.num_targets.item() == 30
    torch.testing.assert_close(loss.cross_entropy, expected.detach())
    torch.testing.assert_close(loss.total, expected + z_term)
    got = torch.autograd.grad(loss.total, list(model.parameters()))
    want = torch.autograd.grad(expected + z_term, list(model.parameters()))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_checkpoint_gives_the_same_bits_back(tmp_path):
    for experts in (0, 4):
        config = dataclasses.replace(TINY, num_experts=experts, num_experts_per_tok=2 if experts else 0)
        model = make_model(config)
        folder = tmp_path / f"experts-{experts}"
        save_checkpoint(folder, model)
        again = load_checkpoint(folder)
        assert again.config == config
        for (name, old), (other, new) in zip(model.named_parameters(), again.named_parameters(), strict=True):
            assert name == other
            assert torch.equal(old, new), name


def test_large_weights_are_sharded_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr("minicpm_edge.formats.checkpoint.MAX_SHARD_BYTES", 100_000)
    model = make_model()
    save_checkpoint(tmp_path / "sharded", model)
    assert len(list((tmp_path / "sharded").glob("model-*-of-*.safetensors"))) > 1
    again = load_checkpoint(tmp_path / "sharded")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def damage_truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def damage_config(folder):
    (folder / "config.json").write_text("{", encoding="utf-8")


def damage_shape(folder):
    config = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(
        config.replace('"vocab_size": 320', '"vocab_size": 321'), encoding="utf-8"
    )


def damage_missing(folder):
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_truncate, "not a readable safetensors"),
        (damage_config, "not readable as JSON"),
        (damage_shape, "has shape"),
        (damage_missing, r"no model\.safetensors"),
    ],
)
def test_a_damaged_checkpoint_is_one_clear_line(tmp_path, damage, words):
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, make_model())
    damage(folder)
    with pytest.raises(UserError, match=words) as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_initial_spread_follows_the_table():
    config = dataclasses.replace(TINY, hidden_size=512, num_attention_heads=8, head_dim=64, vocab_size=1000)
    model = make_model(config)
    matrix_std = 0.1 / (512 / 256) ** 0.5
    assert model.embedding.weight.std().item() == pytest.approx(0.1, rel=0.02)
    assert model.layers[0].attention.qkv.weight.std().item() == pytest.approx(matrix_std, rel=0.02)
    assert model.layers[2].feed_forward.down.weight.std().item() == pytest.approx(matrix_std, rel=0.02)


def test_a_full_disk_is_no_bug_of_ours(tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=r"model\.safetensors"):
            save_checkpoint(tmp_path / "checkpoint", make_model(), tokenizer=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
