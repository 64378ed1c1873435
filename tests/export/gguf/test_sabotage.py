"""Files that are nearly the model: each is caught, whatever its type, and named by what is wrong with it."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from gguf import GGUFReader
from minicpm_export.gguf.format import GGUF
from minicpm_export.gguf.tensor_map import rotary_order
from minicpm_export.pipeline import export
from minicpm_export.source import Source

from minicpm_edge.errors import UserError

pytestmark = pytest.mark.slow  # each writes, reads back and compares a whole export


def set_number(key, value):
    def change(reader):
        reader.fields[key].parts[-1][0] = value

    return change


def flip_kind(text, kind):
    """The kind of one token, in the array of all."""

    def change(reader):
        index = reader.fields["tokenizer.ggml.tokens"].contents().index(text)
        field = reader.fields["tokenizer.ggml.token_type"]
        field.parts[field.data[index]][0] = kind

    return change


def change_template(reader):
    text = reader.fields["tokenizer.chat_template"].parts[-1]
    text[bytes(text).index(b"assistant")] = ord("A")


def drop_template(reader):
    """By another name, which nothing reads."""
    name = reader.fields["tokenizer.chat_template"].parts[1]
    name[-1] = ord("X")


def swap_merges(reader):
    """Two of equal length that follow one another."""
    field = reader.fields["tokenizer.ggml.merges"]
    parts = [field.parts[index] for index in field.data]
    first = next(at for at in range(20, 200) if len(parts[at]) == len(parts[at + 1]))
    swap(parts[first], parts[first + 1])


def swap(first, second):
    kept = first.copy()
    first[:] = second
    second[:] = kept


def tensor(reader, name):
    return next(entry for entry in reader.tensors if entry.name == name).data


def undo_rotary_order(reader):
    query = tensor(reader, "blk.1.attn_q.weight")
    rows = query.copy()
    query[rotary_order(4, 64)] = rows


def swap_layers(reader):
    swap(tensor(reader, "blk.0.ffn_up.weight"), tensor(reader, "blk.2.ffn_up.weight"))


def swap_rows(reader):
    rows = tensor(reader, "blk.1.ffn_gate.weight")
    swap(rows[7], rows[8])


def double_a_scale(reader):
    """Of one block of an embedding: the first half of a Q6_K block's last two bytes is its scale."""
    row = tensor(reader, "token_embd.weight")[100]
    scale = row[:210][-2:].view(np.float16)
    scale[0] *= 2


def double_a_norm(reader):
    tensor(reader, "blk.2.ffn_norm.weight")[5] *= 2


SABOTAGES = {
    "context length": (set_number("minicpm.context_length", 128), "context_length is 128, the model's 256"),
    "norm epsilon ten times": (
        set_number("minicpm.attention.layer_norm_rms_epsilon", 1e-5),
        "layer_norm_rms_epsilon is",
    ),
    "rope base": (set_number("minicpm.rope.freq_base", 10_100.0), "freq_base is 10100"),
    "end of text": (set_number("tokenizer.ggml.eos_token_id", 3), "eos token is 3"),
    "beginning of text": (set_number("tokenizer.ggml.bos_token_id", 3), "bos token is 3"),
    "begin token not added": (
        set_number("tokenizer.ggml.add_bos_token", False),
        "leaves out the begin token",
    ),
    "end of turn as a normal token": (flip_kind("<|im_start|>", 1), "'<|im_start|>' is of kind NORMAL"),
    "a normal token as a control token": (flip_kind("e", 3), "'e' is of kind CONTROL"),
    "template altered": (change_template, "the chat template is not the model's"),
    "template dropped": (drop_template, "the chat template is not the model's"),
    "two merges swapped": (swap_merges, "the merges are not the tokenizer's"),
    "Q of one layer in the checkpoint's order": (undo_rotary_order, "blk.1.attn_q.weight"),
    "up projections of two layers swapped": (swap_layers, "blk.0.ffn_up.weight"),
    "two rows swapped": (swap_rows, "blk.1.ffn_gate.weight"),
    "one scale doubled": (double_a_scale, "token_embd.weight"),
    "one weight of a norm doubled": (double_a_norm, "blk.2.ffn_norm.weight"),
}


@dataclass(frozen=True, kw_only=True)
class Sabotaged(GGUF):
    """A file that is changed in place after it was written."""

    sabotage: object
    is_folder: ClassVar[bool] = False

    def write(self, source, out, scratch, report):
        super().write(source, out, scratch, report)
        reader = GGUFReader(out, "r+")
        self.sabotage(reader)
        reader.data.flush()


@pytest.mark.parametrize("name", SABOTAGES)
def test_each_sabotage_is_named(name, make_model, tmp_path):
    sabotage, message = SABOTAGES[name]
    form = Sabotaged(quant="Q4_K_M", sabotage=sabotage)
    with pytest.raises(UserError) as caught:
        export(form, Source(folder=make_model(), name="m"), tmp_path / "m.gguf")
    assert message in str(caught.value)


def test_a_file_of_experts_is_checked_expert_by_expert(make_model, tmp_path):
    source = Source(folder=make_model(num_experts=4, num_experts_per_tok=2), name="m")
    [made] = export(GGUF(quant="Q4_K_M"), source, tmp_path / "m.gguf")
    assert made.passed

    def swap_experts(reader):
        experts = tensor(reader, "blk.1.ffn_down_exps.weight")
        swap(experts[1], experts[2])

    with pytest.raises(UserError, match=r"blk\.1\.ffn_down_exps\.weight"):
        export(Sabotaged(quant="Q4_K_M", sabotage=swap_experts), source, tmp_path / "m.gguf")
