"""The chat template inside a GGUF renders what ours renders, and llama.cpp reads it as the same tokens."""

import llama_cpp
import pytest
from gguf import GGUFReader
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from minicpm_export.gguf.runtime import LlamaRuntime
from minicpm_export.gguf.writer import write_gguf

from minicpm_edge.text.chat import encode_chat, render
from minicpm_edge.text.tokenizer import Tokenizer

CHATS = {
    "one question": [{"role": "user", "content": "What is a list?"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    "turns": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello. "},
        {"role": "user", "content": "  And now?\n"},
    ],
    "unicode": [{"role": "user", "content": "你好 👩‍👩‍👧 ٣"}],
}


@pytest.fixture(scope="module")
def path(make_model, tmp_path_factory):
    file = tmp_path_factory.mktemp("chat") / "m.gguf"
    write_gguf(make_model(), file, quant="F32", name="chat", report=lambda status: None)
    return file


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("name", CHATS)
def test_the_template_in_the_file(name, prompt, path, make_model):
    template = GGUFReader(path).fields["tokenizer.chat_template"].contents()
    tokenizer = Tokenizer.load(make_model())
    ours = render(CHATS[name], tokenizer.chat_template, add_generation_prompt=prompt)
    assert render(CHATS[name], template, add_generation_prompt=prompt) == ours
    formatter = Jinja2ChatFormatter(template, eos_token="</s>", bos_token="<s>", add_generation_prompt=prompt)
    assert formatter(messages=CHATS[name]).prompt == ours
    with LlamaRuntime(path, context_length=32) as runtime:
        assert runtime.tokenize(ours, special=True) == encode_chat(tokenizer, CHATS[name], prompt)


def test_llama_cpp_finds_it_and_stops_at_the_end_of_a_turn(path, make_model):
    with LlamaRuntime(path, context_length=32) as runtime:
        found = llama_cpp.llama_model_chat_template(runtime.model, None)
        assert found.decode() == Tokenizer.load(make_model()).chat_template
        vocab = llama_cpp.llama_model_get_vocab(runtime.model)
        assert [id for id in range(520) if llama_cpp.llama_vocab_is_eog(vocab, id)] == [2, 4]
        assert llama_cpp.llama_vocab_get_add_bos(vocab)


def test_a_model_without_a_template_has_none_in_its_file(make_model, tmp_path):
    import json
    import shutil

    shutil.copytree(make_model(), tmp_path / "m")
    settings = tmp_path / "m" / "tokenizer_config.json"
    entries = json.loads(settings.read_text(encoding="utf-8"))
    del entries["chat_template"]
    settings.write_text(json.dumps(entries), encoding="utf-8")
    write_gguf(tmp_path / "m", tmp_path / "m.gguf", quant="F32", name="base", report=lambda status: None)
    assert "tokenizer.chat_template" not in GGUFReader(tmp_path / "m.gguf").fields
