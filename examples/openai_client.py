"""The official client against ``minicpm-edge serve``: ``python examples/openai_client.py QUESTION [URL]``."""

import sys

from openai import OpenAI


def main(question: str, url: str = "http://127.0.0.1:8080") -> None:
    """Print the streamed answer and what it cost."""
    # A key is needed only where serve was started with --api-key-file.
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": question}],
        max_tokens=100,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"top_k": 40},  # what OpenAI's API does not have goes here
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        elif chunk.usage:
            print(f"\n({chunk.usage.prompt_tokens} tokens read, {chunk.usage.completion_tokens} written)")


if __name__ == "__main__":
    main(*sys.argv[1:])
