"""A local model inside a program: ``python examples/chat_in_python.py model.gguf "What does len do?"``."""

import sys

from minicpm_edge import UserError, load


def main(model: str, question: str) -> None:
    """Print the answer as it comes."""
    with load(model) as lm:
        messages = [{"role": "user", "content": question}]
        for piece in lm.chat(messages, stream=True, max_tokens=200, temperature=0.7, seed=0):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:3])
    except UserError as error:
        sys.exit(f"error: {error}")
