"""Ask a served model the ten questions of the report: ``python ask.py [http://127.0.0.1:8091/v1]``."""

import json
import sys
from pathlib import Path

from openai import OpenAI

QUESTIONS = (
    "I want to find a restaurant in San Jose.",
    "Can you book a table for two people at 7 pm?",
    "What is the weather like in London tomorrow?",
    "Tom has 3 apples and buys 4 more. How many apples does he have?",
    "A book costs 12 dollars. How much do 5 books cost?",
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain what a compiler does.",
    "How do I list the files in a directory?",
    "Thank you, that is all. Goodbye.",
)


def main() -> None:
    """Print each question with its answer and keep them in answers.json."""
    base_url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8091/v1"
    client = OpenAI(base_url=base_url, api_key="none")
    model = client.models.list().data[0].id
    answers = []
    for question in QUESTIONS:
        reply = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            max_tokens=60,
            temperature=0.3,
            seed=0,
        )
        answers.append({"question": question, "answer": (reply.choices[0].message.content or "").strip()})
        print(f"Q: {question}\nA: {answers[-1]['answer']}")
    text = json.dumps(answers, ensure_ascii=False, indent=1) + "\n"
    Path("answers.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
