"""The Hugging Face folder: the same bits, the same function, also as `transformers` reads it."""

import json
import shutil

import pytest
import torch
from minicpm_export.hf import fold
from minicpm_export.hf import format as hf_format
from minicpm_export.hf.format import HuggingFace
from minicpm_export.pipeline import export
from minicpm_export.source import Source
from minicpm_export.verify import certificate

from minicpm_edge.cli.main import main
from minicpm_edge.errors import UserError
from minicpm_edge.formats.checkpoint import load_checkpoint, open_hf_state_dict, read_config, save_checkpoint
from minicpm_edge.text.tokenizer import Tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": False}, {"num_experts": 4, "num_experts_per_tok": 2}]
)
def test_it_loads_back_equal_to_the_bit(changes, dtype, make_model, tmp_path):
    source = make_model(**changes)
    if dtype != torch.float32:
        model = load_checkpoint(source, dtype=dtype)
        source = tmp_path / "source"
        save_checkpoint(source, model, tokenizer=make_model(**changes))
    [made] = export(HuggingFace(), Source(folder=source, name="m"), tmp_path / "out")
    assert made.passed and made.checks[0].measures.max_logit_difference == 0.0
    ours, theirs = open_hf_state_dict(source), open_hf_state_dict(tmp_path / "out")
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert theirs[name].dtype == dtype
        assert torch.equal(tensor.read().view(torch.uint8), theirs[name].read().view(torch.uint8)), name
    assert read_config(source) == read_config(tmp_path / "out")
    text = "A tokenizer's ids, 12345 of them."
    assert Tokenizer.load(source).encode(text) == Tokenizer.load(tmp_path / "out").encode(text)


def test_the_folder_is_complete_and_says_what_it_is(make_model, tmp_path):
    [made] = export(HuggingFace(), Source(folder=make_model(), name="m"), tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {
        "certificate.json", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["MiniCPMForCausalLM"] and config["torch_dtype"] == "float32"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text(encoding="utf-8"))
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 4], "pad_token_id": 0}
    assert set(made.sha256) == names - {"certificate.json"}
    assert list(certificate.read(tmp_path / "out")["certificates"]) == ["model.safetensors"]


@pytest.fixture
def sharded(make_model, tmp_path, monkeypatch):
    """The small model in shards of 1 MB, as ours above 4 GB is written."""
    from minicpm_edge.formats import checkpoint

    monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", 1 << 20)
    save_checkpoint(tmp_path / "sharded", load_checkpoint(make_model()), tokenizer=make_model())
    return tmp_path / "sharded"


@pytest.mark.slow
def test_sharded_folders_are_copied_whole(sharded, tmp_path, monkeypatch, capsys):
    """By the command, which also prints the certificate: it goes by the name of the index."""
    monkeypatch.chdir(tmp_path)
    shards = sorted(file.name for file in sharded.glob("*.safetensors"))
    assert len(shards) > 2
    assert main(["export", "sharded", "--hf"]) == 0
    out = tmp_path / "sharded-hf"
    assert sorted(file.name for file in out.glob("*.safetensors")) == shards
    [(name, entry)] = certificate.read(out)["certificates"].items()
    assert name == "model.safetensors.index.json" and entry["verdict"] == "pass"
    assert {name, *shards} <= set(entry["sha256"]) and set(entry["model_sha256"]) == set(shards)
    assert entry["sha256"][name] in capsys.readouterr().out
    assert main(["export", "sharded", "--hf"]) == 0  # an export of ours is replaced
    assert main(["export", "sharded-hf", "--gguf", "--quant", "F16"]) == 0


def test_a_damaged_shard_is_caught(sharded, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_format.shutil, "copyfile", flip_one_bit)
    with pytest.raises(UserError, match="differs"):
        export(HuggingFace(), Source(folder=sharded, name="m"), tmp_path / "m")
    assert (tmp_path / "m.rejected").is_dir() and not (tmp_path / "m").exists()


def flip_one_bit(source, target):
    data = bytearray(source.read_bytes())
    if source.suffix == ".safetensors":
        data[-5] ^= 1
    target.write_bytes(data)


def test_a_damaged_copy_is_caught(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_format.shutil, "copyfile", flip_one_bit)
    with pytest.raises(UserError, match="differs"):
        export(HuggingFace(), Source(folder=make_model(), name="m"), tmp_path / "m")
    assert (tmp_path / "m.rejected").is_dir() and not (tmp_path / "m").exists()


@pytest.mark.slow
def test_transformers_computes_the_same_from_the_granite_folder(make_model, token_ids, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = make_model(tie_word_embeddings=False)
    export(HuggingFace(architecture="granite"), Source(folder=source, name="m"), tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(model).__name__ == "GraniteForCausalLM"
    ids = torch.tensor([token_ids])
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, load_checkpoint(source)(ids), atol=1e-4, rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("Hello there, 2024!")["input_ids"] == Tokenizer.load(source).encode(
        "Hello there, 2024!", bos=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_computes_the_same_from_the_llama_folder(tied, dtype, make_model, token_ids, tmp_path):
    """The scales are in the weights: in F32, whose rounding is all that may differ."""
    transformers = pytest.importorskip("transformers")
    source = tmp_path / "source"
    original = make_model(tie_word_embeddings=tied)
    save_checkpoint(source, load_checkpoint(original, dtype=dtype), tokenizer=original)
    [made] = export(HuggingFace(architecture="llama"), Source(folder=source, name="m"), tmp_path / "out")
    assert made.checks[0].measures.mean_kl < 1e-10
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(model).__name__ == "LlamaForCausalLM" and model.config.tie_word_embeddings == tied
    ids = torch.tensor([token_ids])
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, load_checkpoint(source)(ids), atol=1e-4, rtol=0)
    kinds = {name: tensor.dtype for name, tensor in open_hf_state_dict(tmp_path / "out").items()}
    assert kinds["model.layers.0.mlp.down_proj.weight"] == torch.float32
    assert kinds["model.layers.0.mlp.up_proj.weight"] == dtype


def test_a_wrong_fold_is_caught(make_model, tmp_path, monkeypatch):
    scale = fold._scale
    monkeypatch.setattr(
        fold, "_scale", lambda config, name: scale(config, name) if "norm" not in name else 1.0
    )
    with pytest.raises(UserError, match="failed verification"):
        export(HuggingFace(architecture="llama"), Source(folder=make_model(), name="m"), tmp_path / "out")


def test_a_published_folder_keeps_its_own_names_and_code(make_model, tmp_path):
    """auto_map, the code that it names, and keys that this program does not know."""
    folder = tmp_path / "m"
    shutil.copytree(make_model(), folder)
    entries = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    own = {"auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMConfig"}, "mup_denominator": 32}
    (folder / "config.json").write_text(json.dumps(entries | own), encoding="utf-8")
    (folder / "configuration_minicpm.py").write_text("# theirs", encoding="utf-8")
    [made] = export(HuggingFace(), Source(folder=folder, name="m"), tmp_path / "out")
    copied = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert copied == entries | own | {"eos_token_id": [2, 4]}
    assert (tmp_path / "out" / "configuration_minicpm.py").read_text(encoding="utf-8") == "# theirs"
    assert "configuration_minicpm.py" in made.sha256
    export(HuggingFace(architecture="granite"), Source(folder=folder, name="m"), tmp_path / "granite")
    assert not list((tmp_path / "granite").glob("*.py"))


@pytest.mark.slow
def test_a_llama_stays_one(token_ids, tokenizer_folder, tmp_path):
    """By default a folder goes by its own architecture; --architecture minicpm renames it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).eval().save_pretrained(tmp_path / "m")
    shutil.copytree(tokenizer_folder, tmp_path / "m", dirs_exist_ok=True)
    for architecture, name in (("own", "LlamaForCausalLM"), ("minicpm", "MiniCPMForCausalLM")):
        out = tmp_path / architecture
        [made] = export(HuggingFace(architecture=architecture), Source(folder=tmp_path / "m", name="m"), out)
        assert made.passed
        assert json.loads((out / "config.json").read_text(encoding="utf-8"))["architectures"] == [name]
    assert (
        type(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "own")).__name__
        == "LlamaForCausalLM"
    )


@pytest.mark.parametrize("architecture", ["granite", "llama"])
def test_a_mixture_has_no_other_form(architecture, make_model, tmp_path):
    source = make_model(num_experts=4, num_experts_per_tok=2)
    with pytest.raises(UserError, match=f"no {architecture} form"):
        export(HuggingFace(architecture=architecture), Source(folder=source, name="m"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_activation_has_no_granite_form(make_model, tmp_path):
    source = Source(folder=make_model(hidden_act="fatrelu", hidden_act_param=0.01), name="m")
    with pytest.raises(UserError, match="fatrelu"):
        export(HuggingFace(architecture="granite"), source, tmp_path / "out")
    [made] = export(HuggingFace(), source, tmp_path / "out")
    assert made.passed and read_config(tmp_path / "out") == source.config
