"""Many answers in one event loop, each with a deadline: ``python examples/stream_in_asyncio.py model.gguf QUESTION…``.

The loop is free while the model computes, and no thread waits: a thousand open answers cost a thousand small objects.
"""

import asyncio
import sys

from minicpm_edge import LanguageModel, SamplingParams, load

SECONDS = 60


async def answer(lm: LanguageModel, question: str) -> str:
    """The answer, or as much of it as came within ``SECONDS``."""
    prompt = lm.chat_prompt([{"role": "user", "content": question}])
    text = ""
    try:
        async with (
            asyncio.timeout(SECONDS),
            lm.astream(prompt, SamplingParams(max_tokens=60, seed=0)) as chunks,
        ):
            async for chunk in chunks:
                text += chunk.text
    except TimeoutError:
        text += " …"  # leaving the block has stopped the generation
    return text


async def main(model: str, *questions: str) -> None:
    """Ask all at once; print each answer as it is complete."""
    with load(model) as lm:

        async def ask(question: str) -> None:
            print(f"Q: {question}\nA: {await answer(lm, question)}", flush=True)

        await asyncio.gather(*map(ask, questions))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
