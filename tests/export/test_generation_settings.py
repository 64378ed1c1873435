"""End of text and recommended sampling arrive in every form as the source folder has them."""

import json
import shutil

import llama_cpp
import pytest
from gguf import GGUFReader
from minicpm_export.gguf import writer
from minicpm_export.gguf.format import GGUF
from minicpm_export.gguf.runtime import LlamaRuntime
from minicpm_export.gguf.tokenizer import tokenizer_keys
from minicpm_export.hf.format import HuggingFace
from minicpm_export.onnx.format import ONNX
from minicpm_export.pipeline import export
from minicpm_export.source import Source

from minicpm_edge.engines.folder import load_tokenizer, stop_token_ids
from minicpm_edge.errors import UserError

pytestmark = pytest.mark.slow  # each writes, reads back and compares a whole export

SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1}
ENDS = [2, 100, 101]


@pytest.fixture(params=["config.json", "generation_config.json"])
def source(request, make_model, tmp_path):
    """The small model with a list of ends in one of its files, and with recommended sampling."""
    folder = tmp_path / "m"
    shutil.copytree(make_model(), folder)
    for name, extra in (("config.json", {}), ("generation_config.json", SAMPLING)):
        entries = {**json.loads((folder / name).read_text(encoding="utf-8")), **extra}
        entries["eos_token_id"] = ENDS if name == request.param else 2
        (folder / name).write_text(json.dumps(entries), encoding="utf-8")
    return Source(folder=folder, name="m")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_hf_carries_everything(source, tmp_path):
    out = tmp_path / "out"
    export(HuggingFace(), source, out)
    generation = read(out / "generation_config.json")
    assert set(generation["eos_token_id"]) == set(read(out / "config.json")["eos_token_id"]) == {*ENDS, 4}
    assert SAMPLING.items() <= generation.items()
    assert stop_token_ids(out, load_tokenizer(out)) == {*ENDS, 4}


def test_genai_carries_everything(source, tmp_path):
    out = tmp_path / "out"
    export(ONNX(quants=["INT8"]), source, out)
    genai = read(out / "genai_config.json")
    assert set(genai["model"]["eos_token_id"]) == {*ENDS, 4}
    assert SAMPLING.items() <= genai["search"].items()
    assert SAMPLING.items() <= read(out / "generation_config.json").items()
    assert stop_token_ids(out, load_tokenizer(out)) == {*ENDS, 4}


def test_gguf_carries_what_llama_cpp_has_keys_for(source, tmp_path):
    """Two ends beside the end of text; the fourth is said in a note."""
    [made] = export(GGUF(quant="F32"), source, tmp_path / "m.gguf")
    assert [note for note in made.notes if "more than three" in note] == [
        "llama.cpp has no key for more than three tokens that end an answer; left out: [101]"
    ]
    with LlamaRuntime(tmp_path / "m.gguf", context_length=32) as runtime:
        assert {token for token in range(512) if runtime.ends_answer(token)} == {2, 4, 100}
    fields = GGUFReader(tmp_path / "m.gguf").fields
    keys = {"temp": 0.7, "top_p": 0.9, "top_k": 50, "penalty_repeat": 1.1}
    got = {name: fields[f"general.sampling.{name}"].contents() for name in keys}
    assert got == pytest.approx(keys)
    for name, key in (
        ("TEMP", "temp"),
        ("TOP_P", "top_p"),
        ("TOP_K", "top_k"),
        ("PENALTY_REPEAT", "penalty_repeat"),
    ):
        number = getattr(llama_cpp.llama_cpp, f"LLAMA_MODEL_META_KEY_SAMPLING_{name}")
        assert llama_cpp.llama_cpp.llama_model_meta_key_str(number).decode() == f"general.sampling.{key}"


def test_no_sampling_is_recommended_to_a_greedy_model(make_model, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(make_model(), folder)
    entries = {"eos_token_id": 2, "do_sample": False, "temperature": 0.7}
    (folder / "generation_config.json").write_text(json.dumps(entries), encoding="utf-8")
    writer.write_gguf(folder, tmp_path / "m.gguf", quant="F16", name="m", report=lambda status: None)
    assert not [name for name in GGUFReader(tmp_path / "m.gguf").fields if "sampling" in name]


FAULTS = {
    "bos": ("bos_token_id", 3, "bos token is 3, the model's 1"),
    "eos": ("eos_token_id", 3, "eos token is 3, the model's 2"),
    "eot": ("eot_token_id", 7, r"does not end an answer at the tokens \[5\]"),
    "pad": ("padding_token_id", 3, "pad token is 3, the model's 0"),
    "add_bos": ("add_bos_token", False, "leaves out the begin token"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_id_is_caught(fault, make_model, tmp_path, monkeypatch):
    name, wrong, message = FAULTS[fault]
    folder = tmp_path / "m"
    shutil.copytree(make_model(), folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}', encoding="utf-8")

    def changed(*model):
        for key, kind, value in tokenizer_keys(*model):
            drop = fault == "eot" and key.endswith("eom_token_id")
            if not drop:
                yield key, kind, wrong if key == f"tokenizer.ggml.{name}" else value

    monkeypatch.setattr(writer, "tokenizer_keys", changed)
    with pytest.raises(UserError, match=message):
        export(GGUF(quant="F32"), Source(folder=folder, name="m"), tmp_path / "m.gguf")
