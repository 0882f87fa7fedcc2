"""Progress of long work on stderr: a bar with rate and ETA on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

SPACING = 1.0  # seconds between two lines in a log, at least


class Progress:
    """Counts `total` units of work and shows them."""

    def __init__(self, total: int, label: str, unit: str, start: int = 0, lines: int = 20, quiet: bool = False) -> None:
        self.quiet = quiet
        self.total, self.label, self.unit = total, label, unit
        self.done = self.start = start
        self.began = time.monotonic()
        self.note = ""
        self.every = max(1, total // lines)
        self.said = self.began
        terminal = sys.stderr.isatty() and not quiet
        self.bar = tqdm(total=total, initial=start, desc=label, unit=f" {unit}", leave=True) if terminal else None

    def advance(self, count: int = 1, note: str = "") -> None:
        """Add `count` finished units; `note` is shown beside them."""
        before, self.done, self.note = self.done, self.done + count, note or self.note
        if self.bar is not None:
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)
        elif not self.quiet and (before // self.every != self.done // self.every or self.done >= self.total):
            now = time.monotonic()
            last = self.done >= self.total and self.said > self.began
            if last or now - self.said >= SPACING:  # what takes no time needs no lines
                self.said = now
                print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """The state in words: count, rate and time left."""
        seconds = max(time.monotonic() - self.began, 1e-9)
        rate = (self.done - self.start) / seconds
        text = f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.3g} {self.unit}/s"
        if self.done < self.total and rate > 0:
            text += f", {_duration((self.total - self.done) / rate)} left"
        else:
            text += f", {_duration(seconds)}"
        return f"{text}  {self.note}".rstrip()

    def close(self) -> None:
        """Leave the last state standing."""
        if self.bar is not None:
            self.bar.close()


@contextmanager
def progress(
    total: int, label: str, unit: str, start: int = 0, lines: int = 20, quiet: bool = False
) -> Iterator[Progress]:
    """Show the progress of the work done in the `with` block, unless `quiet`."""
    shown = Progress(total, label, unit, start, lines, quiet)
    try:
        yield shown
    finally:
        shown.close()


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
