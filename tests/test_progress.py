"""Progress in a log: plain lines on stderr, of long work only, and not too many."""

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from vgen.progress import progress


class Clock:
    """A clock that is told the time."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    found = Clock()
    with monkeypatch.context() as patch:
        patch.setattr("vgen.progress.time", SimpleNamespace(monotonic=found.monotonic))
        yield found


def work(clock: Clock, seconds: float, steps: int = 40, **options: int) -> None:
    """`steps` steps that take `seconds` in all."""
    with progress(steps, "sample", "images", **options) as shown:  # type: ignore[arg-type]
        for _ in range(steps):
            clock.now += seconds / steps
            shown.advance()


def test_short_work_prints_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    work(clock, 0.9)
    assert capsys.readouterr() == ("", "")


def test_quiet_work_prints_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    work(clock, 1000, quiet=True)
    assert capsys.readouterr() == ("", "")


def test_long_work_prints_a_line_for_every_part(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    work(clock, 80, lines=4)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "sample: 10/40 images, 0.5 images/s, 1:00 left",
        "sample: 20/40 images, 0.5 images/s, 0:40 left",
        "sample: 30/40 images, 0.5 images/s, 0:20 left",
        "sample: 40/40 images, 0.5 images/s, 1:20",
    ]


def test_quick_parts_share_a_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """At most one line a second, whatever the number of parts."""
    work(clock, 5, steps=1000, lines=1000)
    lines = capsys.readouterr().err.splitlines()
    assert 4 <= len(lines) <= 5 and lines[0].startswith("sample: 20") and "200 images/s, 0:04 left" in lines[0]


def test_work_that_showed_lines_shows_its_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    work(clock, 10.5, steps=105, lines=105)
    assert capsys.readouterr().err.splitlines()[-1].startswith("sample: 105/105 images, 10 images/s, 0:10")


def test_work_that_goes_on_counts_its_own_rate(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress(100, "train", "steps", start=80, lines=2) as shown:
        clock.now += 4
        shown.advance(20, note="loss 0.1")
    assert capsys.readouterr().err == "train: 100/100 steps, 5 steps/s, 0:04  loss 0.1\n"


def test_a_terminal_gets_a_bar_unless_quiet(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    work(clock, 100, quiet=True)
    assert capsys.readouterr().err == ""
    work(clock, 100)
    shown = capsys.readouterr().err
    assert "\r" in shown and "40/40" in shown
