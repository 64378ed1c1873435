"""GGUF files read back: by the gguf package for what they say, by llama.cpp for what they compute."""

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from minicpm_export.gguf.quantize import QUANTISED_TYPES, fallbacks, quantize, tensor_types
from minicpm_export.gguf.runtime import LlamaRuntime
from minicpm_export.gguf.tensor_map import rotary_order
from minicpm_export.gguf.writer import write_gguf
from minicpm_export.verify.measures import Comparison

from minicpm_edge.formats.checkpoint import load_checkpoint, open_hf_state_dict
from minicpm_edge.model.config import RopeScaling

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LLAMA3 = RopeScaling(kind="llama3", factor=4.0, original_max_position_embeddings=64)


def longrope(trained, **changes):
    """A context of 1024 tokens, trained with ``trained``; llama.cpp's contexts are multiples of 256."""
    scaling = RopeScaling(
        kind="longrope",
        short_factor=tuple(np.linspace(1.0, 1.5, 32).tolist()),
        long_factor=tuple(np.linspace(1.0, 20.0, 32).tolist()),
        original_max_position_embeddings=trained,
        **changes,
    )
    return {"rope_scaling": scaling, "max_position_embeddings": 1024}


VARIANTS = {
    "tied, grouped keys": {},
    "untied": {"tie_word_embeddings": False},
    "one key head a query head": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    "narrow heads": {"head_dim": 32},
    "mixture of experts": EXPERTS,
    "untied mixture": {**EXPERTS, "tie_word_embeddings": False},
    "linear rope scaling": {"rope_scaling": RopeScaling(kind="linear", factor=2.0)},
    "llama3 rope scaling": {"rope_scaling": LLAMA3},
    "longrope, short text": longrope(256),
    "longrope, long text": longrope(64),
    "longrope, given attention factor": longrope(64, attention_factor=1.2),
    "dynamic rope scaling": {"rope_scaling": RopeScaling(kind="dynamic", factor=4.0)},
    "another rope base": {"rope_theta": 500_000.0},
    "neutral scales": {"scale_emb": 1.0, "scale_depth": 3**0.5, "dim_model_base": 256.0},
}


def write(folder, out, quant="F32"):
    write_gguf(folder, out, quant=quant, name="test", report=lambda status: None)
    return out


def llama_logits(path, ids, **options):
    with LlamaRuntime(path, context_length=len(ids), **options) as runtime:
        return runtime.logits(ids)


def torch_logits(folder, ids):
    with torch.inference_mode():
        return load_checkpoint(folder)(torch.tensor([ids]))[0].numpy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_f32_is_the_model(variant, make_model, token_ids, tmp_path):
    folder = make_model(**VARIANTS[variant])
    got = llama_logits(write(folder, tmp_path / "m.gguf"), token_ids)
    expected = torch_logits(folder, token_ids)
    assert expected.std() > 0.3  # else an error could hide in small logits
    np.testing.assert_allclose(got, expected, atol=1e-3, rtol=0)


# Limits at about three times what these random weights measure.
MEAN_KL = {
    "F16": 3e-7, "BF16": 2e-5, "Q8_0": 2e-4, "Q6_K": 1.5e-3, "Q5_K_M": 3e-3, "Q4_K_M": 1e-2, "Q4_0": 1.5e-2
}  # fmt: skip


@pytest.fixture(scope="module")
def files(make_model, tmp_path_factory):
    """One model in every type."""
    folder, out = make_model(), tmp_path_factory.mktemp("types")
    made = {quant: write(folder, out / f"{quant}.gguf", quant) for quant in ("F32", "F16", "BF16")}
    for quant in QUANTISED_TYPES:
        quantize(made["F32"], out / f"{quant}.gguf", quant)
        made[quant] = out / f"{quant}.gguf"
    return made


@pytest.mark.parametrize("quant", MEAN_KL)
def test_every_type_stays_near_the_model(quant, files, make_model, token_ids):
    comparison = Comparison()
    targets = np.array([*token_ids[1:], -1])
    comparison.add(torch_logits(make_model(), token_ids), llama_logits(files[quant], token_ids), targets)
    assert comparison.measures().mean_kl < MEAN_KL[quant]
    smaller = [files[name].stat().st_size for name in ("F32", "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M")]
    assert smaller == sorted(smaller, reverse=True)


def test_the_runtime_defaults_are_near_too(files, make_model, token_ids):
    """By default llama.cpp rounds its cache to F16: near, but too far off to certify a file with."""
    expected = torch_logits(make_model(), token_ids)
    rounded = np.abs(llama_logits(files["F32"], token_ids, defaults=True) - expected).max()
    exact = np.abs(llama_logits(files["F32"], token_ids) - expected).max()
    assert 5 * exact < rounded < 0.05


def test_the_keys_say_what_the_config_says(files, small_config):
    fields = GGUFReader(files["F32"]).fields
    got = {name: field.contents() for name, field in fields.items() if not name.startswith("tokenizer.ggml.")}
    residual, base = small_config.scale_depth / 3**0.5, 256 / 128
    expected = {
        "general.architecture": "minicpm",
        "general.name": "test",
        "general.file_type": 0,
        "minicpm.block_count": 3,
        "minicpm.context_length": 256,
        "minicpm.embedding_length": 256,
        "minicpm.feed_forward_length": 512,
        "minicpm.vocab_size": 520,
        "minicpm.attention.head_count": 4,
        "minicpm.attention.head_count_kv": 2,
        "minicpm.attention.key_length": 64,
        "minicpm.attention.value_length": 64,
        "minicpm.rope.dimension_count": 64,
    }
    assert expected.items() <= got.items()
    floats = {
        "minicpm.attention.layer_norm_rms_epsilon": 1e-6,
        "minicpm.embedding_scale": 9.0,
        "minicpm.residual_scale": residual,
        "minicpm.logit_scale": base,  # the graph divides by it
        "minicpm.rope.freq_base": 1e4,
    }
    for name, value in floats.items():
        assert got[name] == pytest.approx(value, rel=1e-6), name
    assert "minicpm.expert_count" not in got and "minicpm.rope.scaling.type" not in got


def test_experts_and_rope_scaling_have_their_keys(make_model, tmp_path):
    linear = {"rope_scaling": RopeScaling(kind="linear", factor=2.0)}
    fields = GGUFReader(write(make_model(**EXPERTS, **linear), tmp_path / "m.gguf")).fields
    got = {name: field.contents() for name, field in fields.items() if name.startswith("minicpm.")}
    assert (got["minicpm.expert_count"], got["minicpm.expert_used_count"]) == (4, 2)
    assert (got["minicpm.rope.scaling.type"], got["minicpm.rope.scaling.factor"]) == ("linear", 2.0)


def test_longrope_has_its_keys_and_factors(make_model, tmp_path):
    """Also after quantising."""
    full = write(make_model(**longrope(256)), tmp_path / "full.gguf")
    quantize(full, tmp_path / "m.gguf", "Q4_0")
    for path in (full, tmp_path / "m.gguf"):
        reader = GGUFReader(path)
        got = {name: field.contents() for name, field in reader.fields.items() if "rope.scaling" in name}
        assert got == {
            "minicpm.rope.scaling.type": "longrope",
            "minicpm.rope.scaling.original_context_length": 256,
            "minicpm.rope.scaling.attn_factor": pytest.approx((1 + np.log(4) / np.log(256)) ** 0.5),
        }
        factors = {tensor.name: tensor.data for tensor in reader.tensors if "rope" in tensor.name}
        np.testing.assert_allclose(factors["rope_factors_long.weight"], np.linspace(1, 20, 32), rtol=1e-6)
        np.testing.assert_allclose(factors["rope_factors_short.weight"], np.linspace(1, 1.5, 32), rtol=1e-6)


def test_another_activation_has_no_form(make_model, tmp_path):
    from minicpm_edge.errors import UserError

    folder = make_model(hidden_act="fatrelu", hidden_act_param=0.01)
    with pytest.raises(UserError, match=r"'fatrelu' has no GGUF form.*--onnx and --hf"):
        write(folder, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_the_tensors_are_the_checkpoints(files, make_model):
    stored = {tensor.name: tensor.data for tensor in GGUFReader(files["F32"]).tensors}
    tensors = open_hf_state_dict(make_model())
    assert len(stored) == len(tensors) and "output.weight" not in stored
    down = tensors["model.layers.1.mlp.down_proj.weight"].read().numpy()
    np.testing.assert_array_equal(stored["blk.1.ffn_down.weight"], down)
    query = tensors["model.layers.2.self_attn.q_proj.weight"].read().numpy()
    got = stored["blk.2.attn_q.weight"]
    # Row 2i of a head is the checkpoint's row i, row 2i + 1 its row i + 32.
    np.testing.assert_array_equal(got[64:128:2], query[64:96])
    np.testing.assert_array_equal(got[65:128:2], query[96:128])


def test_rotary_order_is_a_permutation_within_each_head():
    assert rotary_order(2, 6).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_norms_and_routers_stay_in_f32(make_model, tmp_path):
    types = tensor_types(write(make_model(**EXPERTS), tmp_path / "m.gguf", "BF16"))
    wanted = {name: "F32" if "norm" in name or "gate_inp" in name else "BF16" for name in types}
    assert {name: kind for name, (kind, _) in types.items()} == wanted


def test_a_llama_folder_exports_as_a_neutral_minicpm(token_ids, tokenizer_folder, tmp_path):
    """Judged by `transformers`, which wrote the folder: no code of ours on the reference's side."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "llama")
    for file in tokenizer_folder.iterdir():
        (tmp_path / "llama" / file.name).write_bytes(file.read_bytes())
    path = write(tmp_path / "llama", tmp_path / "m.gguf")
    with torch.inference_mode():
        expected = model(torch.tensor([token_ids])).logits[0].numpy()
    np.testing.assert_allclose(llama_logits(path, token_ids), expected, atol=1e-3, rtol=0)
    fields = GGUFReader(path).fields
    scales = [fields[f"minicpm.{name}_scale"].contents() for name in ("embedding", "residual", "logit")]
    assert scales == pytest.approx([1.0, 1.0, 1.0])


def test_fallbacks_are_told_plainly(make_model, tmp_path):
    folder = make_model(hidden_size=320, num_attention_heads=5, num_key_value_heads=5, intermediate_size=512)
    quantize(write(folder, tmp_path / "full.gguf"), tmp_path / "m.gguf", "Q4_K_M")
    types = tensor_types(tmp_path / "m.gguf")
    assert types["blk.0.attn_q.weight"] == ("Q5_0", 320)
    assert types["blk.0.ffn_down.weight"][0] in ("Q4_K", "Q6_K")  # rows of 512 divide into its blocks
    lines = fallbacks(types, "Q4_K_M")
    assert any("Q5_0" in line and "320" in line for line in lines)
    assert fallbacks(types, "F32") == []


def test_no_fallback_where_rows_divide(files):
    assert all(fallbacks(tensor_types(files[quant]), quant) == [] for quant in QUANTISED_TYPES)


def test_weights_that_f16_cannot_hold_are_refused(make_model, tmp_path):
    from minicpm_edge.errors import UserError
    from minicpm_edge.formats.checkpoint import save_checkpoint

    source = make_model()
    model = load_checkpoint(source)
    with torch.no_grad():
        model.layers[1].feed_forward.down.weight[3, 5] = 1e5
        save_checkpoint(tmp_path / "large", model, tokenizer=source)
        model.layers[1].feed_forward.down.weight[3, 5] = float("nan")
        save_checkpoint(tmp_path / "nan", model, tokenizer=source)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.down_proj.*too large for F16"):
        write(tmp_path / "large", tmp_path / "m.gguf", "F16")
    write(tmp_path / "large", tmp_path / "m.gguf", "BF16")
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.down_proj.*not finite"):
        write(tmp_path / "nan", tmp_path / "n.gguf", "F32")


def test_a_bfloat16_checkpoint_exports_its_exact_values(make_model, token_ids, tmp_path):
    from minicpm_edge.formats.checkpoint import save_checkpoint

    source = make_model()
    save_checkpoint(tmp_path / "m", load_checkpoint(source, dtype=torch.bfloat16), tokenizer=source)
    path = write(tmp_path / "m", tmp_path / "m.gguf", "BF16")
    stored = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    value = open_hf_state_dict(tmp_path / "m")["model.layers.0.mlp.up_proj.weight"].read()
    np.testing.assert_array_equal(
        stored["blk.0.ffn_up.weight"].view(np.int16), value.view(torch.int16).numpy()
    )
    expected = torch_logits(tmp_path / "m", token_ids)
    got = llama_logits(write(tmp_path / "m", tmp_path / "f32.gguf"), token_ids)
    np.testing.assert_allclose(got, expected, atol=1e-3, rtol=0)
