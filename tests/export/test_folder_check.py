"""A folder whose settings are not the model's is caught, though its weights are."""

import json

import pytest
from minicpm_export.hf.format import HuggingFace
from minicpm_export.onnx.format import ONNX
from minicpm_export.pipeline import export
from minicpm_export.source import Source

from minicpm_edge.errors import UserError

pytestmark = pytest.mark.slow  # each writes, reads back and compares a whole export


def change(name, **entries):
    """Other values in one of the folder's JSON files; None removes a key."""

    def apply(folder):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        content.update(entries)
        kept = {key: value for key, value in content.items() if value is not None}
        (folder / name).write_text(json.dumps(kept), encoding="utf-8")

    return apply


def swap_merges(folder):
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    merges = content["model"]["merges"]
    merges[10], merges[11] = merges[11], merges[10]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


SABOTAGES = {
    "template dropped": (change("tokenizer_config.json", chat_template=None), "chat template is not"),
    "template altered": (
        change("tokenizer_config.json", chat_template="{{ messages }}"),
        "chat template is not",
    ),
    "two merges swapped": (swap_merges, "tokenizer is not"),
    "end of text": (change("tokenizer_config.json", eos_token="<|im_start|>"), "end of text: 3"),
    "ends of an answer": (change("generation_config.json", eos_token_id=[2, 4, 9]), "ends of an answer"),
    "begin of text": (change("tokenizer_config.json", bos_token="<pad>"), "begin of text: 0"),
    "sampling": (change("generation_config.json", temperature=2.0), "sampling"),
    "context length": (change("config.json", max_position_embeddings=128), "context length: 128"),
    "norm epsilon": (change("config.json", rms_norm_eps=1e-5), "norm epsilon"),
}
GENAI = change("genai_config.json", search={"temperature": 2.0})
FORMS = {"hf": HuggingFace, "onnx": ONNX}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*SABOTAGES, "genai"])
def test_each_sabotage_is_named(name, form, make_model, tmp_path):
    sabotage, message = SABOTAGES.get(name, (GENAI, "genai_config.json, sampling"))
    if name == "genai" and form == "hf":
        pytest.skip("onnxruntime-genai reads ONNX folders only")

    class Sabotaged(FORMS[form]):
        def write(self, source, out, scratch, report):
            super().write(source, out, scratch, report)
            sabotage(out)

    with pytest.raises(UserError) as caught:
        export(Sabotaged(), Source(folder=make_model(), name="m"), tmp_path / "out")
    assert message in str(caught.value)
