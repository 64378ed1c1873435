"""The ONNX graph: the model's logits, its cache, its names, and the other programs that read it."""

import json

import numpy as np
import onnx
import pytest
import torch
from minicpm_export.onnx import format as onnx_format
from minicpm_export.onnx.format import ONNX
from minicpm_export.onnx.graph import MATRICES, build
from minicpm_export.onnx.runtime import OrtRuntime
from minicpm_export.onnx.weights import Initializers, quantize_rows
from minicpm_export.pipeline import export
from minicpm_export.source import Source
from minicpm_export.verify import certificate

from minicpm_edge.errors import UserError
from minicpm_edge.formats.checkpoint import load_checkpoint, open_hf_state_dict, read_config, sha256
from minicpm_edge.model.config import RopeScaling
from minicpm_edge.text.tokenizer import Tokenizer


def longrope(trained, context):
    scaling = RopeScaling(
        kind="longrope",
        short_factor=tuple(np.linspace(1.0, 1.5, 32).tolist()),
        long_factor=tuple(np.linspace(1.0, 20.0, 32).tolist()),
        original_max_position_embeddings=trained,
    )
    return {"rope_scaling": scaling, "max_position_embeddings": context}


VARIANTS = {
    "tied, grouped keys": {},
    "untied": {"tie_word_embeddings": False},
    "one key head a query head": {"num_key_value_heads": 4},
    "narrow heads": {"head_dim": 32},
    "llama3 rope scaling": {
        "rope_scaling": RopeScaling(kind="llama3", factor=4.0, original_max_position_embeddings=64)
    },
    "longrope, trained context": longrope(256, 256),
    "longrope, short text": longrope(128, 256),
    "dynamic rope scaling": {"rope_scaling": RopeScaling(kind="dynamic", factor=4.0)},
    "fatrelu": {"hidden_act": "fatrelu", "hidden_act_param": 0.01},
    "rows that do not divide into blocks": {"intermediate_size": 500},
}


def write(folder, path, *, int8, external=False):
    data = path.with_name(path.name + "_data") if external else None
    with Initializers(data) as initializers:
        model = build(
            read_config(folder),
            open_hf_state_dict(folder),
            initializers,
            int8=int8,
            report=lambda status: None,
        )
    onnx.save(model, path)
    return path


def torch_logits(folder, ids):
    with torch.inference_mode():
        return load_checkpoint(folder)(torch.tensor([ids]))[0].numpy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp32_is_the_model(variant, make_model, token_ids, tmp_path):
    folder = make_model(**VARIANTS[variant])
    path, expected = write(folder, tmp_path / "m.onnx", int8=False), torch_logits(folder, token_ids)
    assert expected.std() > 0.3
    for through_cache in (False, True):
        got = OrtRuntime(path, through_cache=through_cache).logits(token_ids)
        np.testing.assert_allclose(got, expected, atol=2e-4, rtol=0)


def test_longrope_turns_long_texts_by_the_long_factors(make_model, token_ids, tmp_path):
    """A text longer than the trained context as one prompt; in parts the factors would change on the way."""
    folder = make_model(**longrope(64, 256))
    runtime = OrtRuntime(write(folder, tmp_path / "m.onnx", int8=False))
    for ids in (token_ids[:60], token_ids[:64], token_ids[:65], token_ids):
        np.testing.assert_allclose(runtime.logits(ids), torch_logits(folder, ids), atol=2e-4, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_int8_is_near_and_a_quarter_of_the_size(variant, make_model, token_ids, tmp_path):
    folder = make_model(**VARIANTS[variant])
    path, expected = write(folder, tmp_path / "m.onnx", int8=True), torch_logits(folder, token_ids)
    full = write(folder, tmp_path / "full.onnx", int8=False)
    assert path.stat().st_size < 0.35 * full.stat().st_size
    whole = OrtRuntime(path).logits(token_ids)
    cost = np.abs(whole - expected).mean()
    assert 1e-4 < cost < 0.02 * expected.std()
    # Activations are rounded for each token by itself: apart from a rounding that tips over, company changes nothing.
    assert np.abs(OrtRuntime(path, through_cache=True).logits(token_ids) - whole).mean() < 0.3 * cost


def test_rows_of_a_batch_do_not_see_each_other(make_model, token_ids, tmp_path):
    """Two texts of unequal length in one batch, the shorter filled up at its end."""
    folder = make_model()
    session = OrtRuntime(write(folder, tmp_path / "m.onnx", int8=False)).session
    short, long = token_ids[:7], token_ids[20:40]
    ids = np.array([[*short, *[0] * 13], long], dtype=np.int64)
    mask = np.array([[1] * 7 + [0] * 13, [1] * 20], dtype=np.int64)
    cache = {
        entry.name: np.zeros((2, entry.shape[1], 0, entry.shape[3]), dtype=np.float32)
        for entry in session.get_inputs()[2:]
    }
    logits = session.run(["logits"], {"input_ids": ids, "attention_mask": mask, **cache})[0]
    np.testing.assert_allclose(logits[0, :7], torch_logits(folder, short), atol=2e-4)
    np.testing.assert_allclose(logits[1], torch_logits(folder, long), atol=2e-4)


def test_names_and_shapes_are_those_the_runtimes_expect(make_model, tmp_path):
    graph = onnx.load(write(make_model(), tmp_path / "m.onnx", int8=False)).graph

    def shapes(values):
        return {
            value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
            for value in values
        }

    cache = {(layer, part) for layer in range(3) for part in ("key", "value")}
    assert shapes(graph.input) == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        **{f"past_key_values.{n}.{part}": ["batch_size", 2, "past_sequence_length", 64] for n, part in cache},
    }
    assert shapes(graph.output) == {
        "logits": ["batch_size", "sequence_length", 520],
        **{f"present.{n}.{part}": ["batch_size", 2, "total_sequence_length", 64] for n, part in cache},
    }


def test_a_tied_matrix_is_stored_once(make_model, tmp_path):
    graph = onnx.load(write(make_model(), tmp_path / "m.onnx", int8=True)).graph
    assert sum(520 in tensor.dims for tensor in graph.initializer) == 2  # its bytes and its scales


def test_weights_beside_the_graph(make_model, token_ids, tmp_path):
    folder = make_model()
    path = write(folder, tmp_path / "m.onnx", int8=False, external=True)
    assert path.stat().st_size < 100_000 < (tmp_path / "m.onnx_data").stat().st_size
    onnx.load(path)  # every offset and length holds
    np.testing.assert_allclose(OrtRuntime(path).logits(token_ids), torch_logits(folder, token_ids), atol=2e-4)


def test_blocks_hold_the_weights_to_half_a_step():
    rng = np.random.default_rng(3)
    weight = (rng.standard_normal((6, 70)) * 10.0 ** rng.integers(-4, 3, (6, 1))).astype(np.float32)
    weight[4] = 0
    blocks, scales = quantize_rows(weight)
    assert blocks.shape == (6, 3, 32) and scales.shape == (6, 3)
    back = ((blocks.astype(np.float32) - 128) * scales[..., None]).reshape(6, -1)
    assert (back[:, 70:] == 0).all() and (back[4] == 0).all()
    error = np.abs(back[:, :70] - weight).reshape(6, -1)
    np.testing.assert_array_less(error, np.repeat(scales, 32, axis=1)[:, :70] * 0.501 + 1e-30)


@pytest.fixture(scope="module")
def folder(make_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("onnx") / "model"
    made = export(ONNX(), Source(folder=make_model(), name="small"), out)
    assert all(one.passed for one in made)
    return out


def test_the_folder(folder):
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert names == {
        "certificate.json", "chat_template.jinja", "config.json", "genai_config.json", "generation_config.json",
        "tokenizer.json", "tokenizer_config.json", "onnx/model.onnx", "onnx/model_quantized.onnx",
    }  # fmt: skip
    entries = certificate.read(folder)["certificates"]
    assert sorted(entries) == ["onnx/model.onnx", "onnx/model_quantized.onnx"]
    for name, entry in entries.items():
        assert entry["sha256"][name] == sha256(folder / name)
        assert [check["what"] for check in entry["checks"]] == [entry["quant"], "… through its cache"]
        assert entry["checks"][0]["runtime"].startswith("ONNX Runtime")
    fp32, int8 = (entries[name]["checks"][0]["measures"] for name in sorted(entries))
    assert fp32["max_logit_difference"] < 1e-3 and fp32["mean_kl"] < 1e-8 < int8["mean_kl"] < 1e-2


def test_a_wrong_graph_is_caught(make_model, tmp_path, monkeypatch):
    monkeypatch.setitem(MATRICES, "down", (("mlp.down_proj",), lambda config: 1.0))
    with pytest.raises(UserError, match="export failed verification"):
        export(ONNX(quants=("F32",)), Source(folder=make_model(), name="m"), tmp_path / "m")
    assert not (tmp_path / "m").exists() and (tmp_path / "m.rejected").is_dir()


def test_large_models_keep_their_weights_beside(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_format, "MAX_INLINE_BYTES", 4 << 20)
    export(ONNX(), Source(folder=make_model(), name="m"), tmp_path / "m")
    assert (tmp_path / "m" / "onnx" / "model.onnx_data").is_file()
    assert not (tmp_path / "m" / "onnx" / "model_quantized.onnx_data").exists()
    settings = json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8"))[
        "transformers.js_config"
    ]
    assert settings == {"dtype": "q8", "use_external_data_format": {"model.onnx": 1}}
    entry = certificate.read(tmp_path / "m")["certificates"]["onnx/model.onnx"]
    assert "onnx/model.onnx_data" in entry["sha256"]


def test_what_has_no_onnx_form_is_told(make_model, tmp_path):
    experts = make_model(num_experts=4, num_experts_per_tok=2)
    with pytest.raises(UserError, match=r"mixture of experts.*--gguf"):
        export(ONNX(quants=("F32",)), Source(folder=experts, name="m"), tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("file", ["onnx/model.onnx", "onnx/model_quantized.onnx"])
def test_onnxruntime_genai_gives_the_same_tokens(file, folder, make_model, tmp_path):
    og = pytest.importorskip("onnxruntime_genai")
    import shutil

    shutil.copytree(folder, tmp_path / "m")
    settings = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    settings["model"]["decoder"]["filename"] = file
    (tmp_path / "m" / "genai_config.json").write_text(json.dumps(settings), encoding="utf-8")
    model = og.Model(str(tmp_path / "m"))
    text = "The tokens of a text, 12 of them"
    ids = [1, *map(int, og.Tokenizer(model).encode(text))]
    assert ids == Tokenizer.load(make_model()).encode(text, bos=True)
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + 12, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    runtime = OrtRuntime(folder / file)
    expected = list(ids)
    while len(expected) < len(ids) + 12 and expected[-1] not in (2, 4):
        expected.append(int(runtime.logits(expected)[-1].argmax()))
    assert list(map(int, generator.get_sequence(0))) == expected
