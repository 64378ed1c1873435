"""The engine's door: events in order, first come first served, one thread that computes, and every way to let go."""

from __future__ import annotations

import asyncio
import gc
import signal
import subprocess
import sys
import threading
import time
import weakref
from queue import SimpleQueue

import pytest

from minicpm_edge.engines.base import Chunk, Ended, Started
from minicpm_edge.engines.sampling_params import SamplingParams
from minicpm_edge.errors import UserError


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"still not so after {seconds} s"
        time.sleep(0.001)


def submit(model, prompt, **sampling):
    """A request and the queue of its events."""
    events = SimpleQueue()
    return model.submit(prompt, SamplingParams.of(**sampling), events.put), events


def until_ended(events):
    collected = [events.get(timeout=60)]
    while not isinstance(collected[-1], Ended):
        collected.append(events.get(timeout=60))
    return collected


def begin_slow(model):
    """A request that occupies the engine until it is cancelled."""
    request, events = submit(model, "slow")
    assert events.get(timeout=60) == Started()
    wait_until(lambda: model.runner.prompts == ["slow"])
    return request


def test_started_then_chunks_then_ended(scripted):
    _, events = submit(scripted(b"ab"), "hi")
    started, *chunks, ended = until_ended(events)
    assert started == Started() and ended == Ended()
    assert [chunk.text for chunk in chunks] == ["a", "b", ""]
    assert chunks[-1] == Chunk(text="", finish_reason="stop", num_prompt_tokens=2, num_completion_tokens=3)


def test_first_come_first_served_in_one_thread(scripted):
    model = scripted(b"x")
    slow = begin_slow(model)
    waiting = [submit(model, str(number))[1] for number in range(20)]
    vector = model.submit_embedding("hello")
    slow.cancel()
    for events in waiting:
        until_ended(events)
    assert vector.result(60) == [5.0]
    model.close()
    assert model.runner.prompts == ["slow", *map(str, range(20))]
    assert len(model.runner.threads) == 1 and threading.get_ident() not in model.runner.threads
    assert model.runner.closed


def test_a_request_cancelled_before_its_turn_is_never_begun(scripted):
    model = scripted(b"x")
    slow = begin_slow(model)
    gone, events = submit(model, "gone")
    vector = model.submit_embedding("gone")
    gone.cancel()
    assert vector.cancel()
    slow.cancel()
    assert until_ended(events) == [Ended()]
    assert model.generate("next") == "x" and model.runner.prompts == ["slow", "next"]


def test_an_error_is_its_own_request_s(scripted):
    model = scripted(b"x")
    with pytest.raises(ZeroDivisionError, match="a bug in the runtime"):
        model.generate("bad")
    with pytest.raises(ZeroDivisionError, match="a bug in the runtime"):
        model.embed("bad")
    assert model.generate("good") == "x" and model.embed("good") == [4.0]


def test_a_reader_may_be_slower_than_the_engine(scripted):
    model = scripted(b"hello")
    early = model.stream("one")
    assert next(early).text == "h"
    assert model.generate("two") == "hello", "an open stream keeps nobody waiting"
    assert "".join(chunk.text for chunk in early) == "ello"
    assert list(early) == []


def test_cancelling_wakes_the_one_who_waits(scripted):
    model = scripted(b"x")
    reading, waiting = model.stream("slow"), model.stream("behind it")
    for generation in (waiting, reading):
        seen = []
        reader = threading.Thread(
            target=lambda stream, into: into.append(list(stream)), args=(generation, seen)
        )
        reader.start()
        generation.cancel()
        reader.join(60)
        assert seen == [[]] and generation.cancelled
    assert model.generate("next") == "x"


def test_dropping_a_stream_cancels_it(scripted):
    model = scripted(b"x")
    stream = model.stream("slow")
    del stream
    gc.collect()
    assert model.generate("next") == "x"


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT to one thread")
def test_ctrl_c_while_a_prompt_is_read(scripted):
    model = scripted(b"x")
    main = threading.main_thread().ident
    stream = model.stream("slow")
    with pytest.raises(KeyboardInterrupt):  # from here on, however long the machine takes to get to the wait
        threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
        next(stream)
    assert model.generate("next") == "x", "the engine has let go"


def test_closing_ends_what_runs_and_what_waits(scripted):
    model = scripted(b"x")
    _, running = submit(model, "slow")
    assert running.get(timeout=60) == Started()
    _, waiting = submit(model, "waiting")
    vector = model.submit_embedding("waiting")
    model.close()
    for events in (running, waiting):
        (ended,) = until_ended(events)
        assert isinstance(ended.error, UserError) and "closed" in str(ended.error)
    with pytest.raises(UserError, match="closed"):
        vector.result(60)
    assert model.runner.prompts == ["slow"] and model.runner.closed
    for use in (lambda: model.stream("a"), lambda: model.embed("a"), lambda: submit(model, "a")):
        with pytest.raises(UserError, match="closed"):
            use()


def test_a_complete_text_is_no_error_though_the_model_closes(scripted):
    model = scripted(b"ab")
    _, events = submit(model, "hi")
    collected = until_ended(events)
    model.close()
    assert collected[-1] == Ended()


def test_a_model_that_nobody_holds_frees_itself(scripted):
    from minicpm_edge.engines.sequential import SequentialEngine
    from minicpm_edge.language_model import LanguageModel

    runner = scripted(b"x").runner
    model = LanguageModel(SequentialEngine(runner), name="dropped")
    assert model.generate("hi") == "x"
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    wait_until(lambda: runner.closed)


def test_a_program_that_closes_nothing_ends(tiny_gguf):
    pytest.importorskip("llama_cpp")
    code = (
        "import sys; from minicpm_edge import load\n"
        "model = load(sys.argv[1], threads=1)\n"
        "stream = model.stream('hello'); next(stream)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tiny_gguf], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- in an event loop ---


def test_many_in_one_event_loop_need_no_threads_of_their_own(scripted):
    model = scripted(b"hello")

    async def ask(number):
        generation = model.astream(f"number {number}")
        await generation.started()
        return "".join([chunk.text async for chunk in generation])

    async def ask_all():
        before = threading.active_count()
        tasks = [asyncio.ensure_future(ask(number)) for number in range(50)]
        await asyncio.sleep(0)
        return await asyncio.gather(*tasks), threading.active_count() - before

    assert asyncio.run(ask_all()) == (["hello"] * 50, 0)
    assert model.runner.prompts == [f"number {number}" for number in range(50)]


def test_a_cancelled_task_cancels_its_generation(scripted):
    model = scripted(b"x")

    async def leave():
        async def read(prompt):
            return [chunk async for chunk in model.astream(prompt)]

        tasks = [asyncio.ensure_future(read(prompt)) for prompt in ("slow", "waiting")]
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
        async with model.astream("slow") as left_early:
            await left_early.started()
        return [chunk.text async for chunk in model.astream("next")]

    assert asyncio.run(leave()) == ["x", ""]
    assert model.runner.prompts == ["slow", "slow", "next"]


def test_the_loop_stays_free_and_hears_of_errors(scripted):
    model = scripted(b"x")

    async def run():
        slow = model.astream("slow")
        await slow.started()
        ticks = 0
        for _ in range(20):
            await asyncio.sleep(0.001)
            ticks += 1
        slow.cancel()
        assert [chunk async for chunk in slow] == []
        with pytest.raises(ZeroDivisionError):
            await model.astream("bad").__anext__()
        with pytest.raises(UserError, match="empty"):
            model.astream("")
        pending = model.astream("slow")
        await pending.started()
        model.close()
        with pytest.raises(UserError, match="closed"):
            await pending.__anext__()
        return ticks

    assert asyncio.run(run()) == 20


def test_an_event_loop_that_has_closed_harms_nobody(scripted):
    model = scripted(b"hello")

    async def abandon():
        abandoned.append(model.astream("slow"))
        await abandoned[0].started()

    abandoned = []
    asyncio.run(abandon())
    abandoned.clear()
    gc.collect()
    assert model.generate("next") == "hello"
