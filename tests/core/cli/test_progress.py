"""A progress line on a terminal and in a log file."""

import io

from minicpm_edge.cli.progress import Progress, duration, fit


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_output_is_one_whole_line_every_ten_seconds():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream, clock=clock)
    for second in range(25):
        clock.now = second
        progress.update(f"step {second}")
    progress.finish()
    assert stream.getvalue() == "step 0\nstep 10\nstep 20\nstep 24\n"


def test_terminal_rewrites_one_line_at_most_ten_times_a_second():
    stream, clock = Terminal(), Clock()
    progress = Progress(stream, clock=clock)
    for tick in range(100):
        clock.now = tick / 100
        progress.update(f"tick {tick}")
    progress.finish("done")
    written = stream.getvalue()
    assert 10 <= written.count("tick") <= 11
    assert written.count("\n") == 1
    assert written.endswith("\r\x1b[Kdone\n")


def test_a_status_longer_than_the_terminal_is_cut(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    stream = Terminal()
    Progress(stream).update("x" * 100)
    assert stream.getvalue().count("x") == 19


def test_messages_stay_above_the_live_line():
    stream = Terminal()
    with Progress(stream) as progress:
        progress.update("working")
        progress.message("a warning")
        progress.update("working on")
    assert stream.getvalue() == "\r\x1b[Kworking\r\x1b[Ka warning\n\r\x1b[Kworking on\n"


def test_nothing_is_written_without_an_update():
    stream = io.StringIO()
    with Progress(stream):
        pass
    assert stream.getvalue() == ""


def test_newlines_in_a_status_do_not_break_the_line():
    stream = io.StringIO()
    Progress(stream).update("one\ntwo")
    assert stream.getvalue() == "one two\n"


def test_fit_counts_wide_characters_twice():
    assert fit("模型训练", 5) == "模型"
    assert fit("abc", 5) == "abc"


def test_durations():
    assert [duration(seconds) for seconds in (0.4, 59, 75, 3600, 7384)] == [
        "0s",
        "59s",
        "1m15s",
        "1h00m",
        "2h03m",
    ]
