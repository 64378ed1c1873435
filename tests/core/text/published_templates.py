"""Do published chat templates render as transformers renders them?

``python tests/core/text/published_templates.py FOLDER`` compares every ``.jinja`` file in FOLDER, on conversations with
and without system prompt, tools, tool calls, thinking and generation prompt; a name and a reason for each that differs.
Seventy such files lie in llama.cpp's ``models/templates``, which the source package of llama-cpp-python contains.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

from minicpm_edge.errors import UserError
from minicpm_edge.text.chat_template import run_template

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "a city", "enum": ["Oslo", "Rome"]},
        "days": {"type": ["integer", "null"]},
        "place": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]},
        "names": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["city"],
}
TOOL = {"name": "weather", "description": "The weather.", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": TOOL}]
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hello <b>&</b> 'you' é"}
ANSWER = {"role": "assistant", "content": "Hi."}
AGAIN = {"role": "user", "content": "And now?"}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": '{"t": 3}'}


def call(arguments: object) -> dict[str, object]:
    function = {"name": "weather", "arguments": arguments}
    calls = [{"type": "function", "id": "abcdefghi", "function": function}]
    return {"role": "assistant", "content": "", "tool_calls": calls}


CHATS = {
    "a question": {"messages": [USER]},
    "a system prompt": {"messages": [SYSTEM, USER]},
    "turns": {"messages": [SYSTEM, USER, ANSWER, AGAIN]},
    "a thought": {"messages": [USER, {**ANSWER, "reasoning_content": "I think."}, AGAIN, ANSWER]},
    "no thinking": {"messages": [USER, ANSWER, AGAIN], "enable_thinking": False},
    "tools": {"messages": [SYSTEM, USER], "tools": TOOLS},
    "a call": {"messages": [USER, call({"city": "Oslo", "days": 2}), RESULT], "tools": TOOLS},
    "a call in JSON": {"messages": [USER, call('{"city": "Oslo"}'), RESULT, ANSWER, AGAIN], "tools": TOOLS},
}


def difference(source: str, chat: dict[str, object]) -> str | None:
    """How ours differs from transformers on one conversation; None where both refuse or make the same text."""
    more = {"tools": None, "documents": None, "bos_token": "<s>", "eos_token": "</s>", **chat}
    messages = more.pop("messages")
    try:
        [[expected], _] = render_jinja_template([messages], chat_template=source, **more)
    # Whatever a template raises there, it may raise here.
    except Exception:  # noqa: BLE001
        expected = None
    try:
        text = run_template(source, {"messages": messages, **more})
    except UserError as error:
        return None if expected is None else str(error)
    return None if text == expected else f"{text!r}, not {expected!r}"


def main(folder: Path) -> int:
    paths = sorted(folder.glob("*.jinja"))
    num_different = 0
    for path in paths:
        source = path.read_text(encoding="utf-8")
        for name, chat in CHATS.items():
            for add_generation_prompt in (True, False):
                problem = difference(source, {**chat, "add_generation_prompt": add_generation_prompt})
                if problem:
                    num_different += 1
                    print(f"{path.name}, {name}, generation prompt {add_generation_prompt}: {problem[:400]}")
    print(f"{len(paths)} templates, {2 * len(CHATS)} conversations each: {num_different} differ")
    return bool(num_different or not paths)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
