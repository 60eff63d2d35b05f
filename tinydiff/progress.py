"""What a person sees of a long job: a bar on a terminal, plain lines otherwise, everything on stderr."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from tinydiff import processes
from tinydiff.system import one_line


def note(text: str) -> None:
    """A line for a person, of several processes once."""
    if processes.rank() == 0:
        print(one_line(f"note: {text}"), file=sys.stderr)


def duration(seconds: float) -> str:
    """Seconds as 45s, 3m20s or 2h05m."""
    s = int(seconds)
    return f"{s}s" if s < 60 else f"{s // 60}m{s % 60:02d}s" if s < 3600 else f"{s // 3600}h{s % 3600 // 60:02d}m"


class Progress:
    """Reports `step` of `total`; on a terminal a redrawn bar, else a line at most every `every` seconds."""

    def __init__(self, label: str, total: int, start: int = 0, stream: TextIO | None = None, every: float = 30.0):
        self.label, self.total, self.first, self.every = label, total, start, every
        self.stream = stream or sys.stderr
        self.bar = self.stream.isatty()
        self.begun = self.shown = time.monotonic()

    def update(self, step: int, note: str = "", rest: float | None = None) -> None:
        """Of the whole run, of which this is a part, `rest` seconds are left, where that is known."""
        now = time.monotonic()
        if step < self.total and now - self.shown < (0.1 if self.bar else self.every):
            return
        self.shown = now
        rate = (step - self.first) / max(1e-9, now - self.begun)
        left = duration((self.total - step) / rate) if rate > 0 else "?"
        left += f" left, of the run {duration(rest)}" if rest is not None else " left"
        text = f"{self.label} {step}/{self.total} {note} {rate:.2f} steps/s, {left}"
        if self.bar:
            done = 24 * step // max(1, self.total)
            self.write(f"\r\x1b[K[{'=' * done}{' ' * (24 - done)}] {text}" + ("\n" if step >= self.total else ""))
        else:
            self.write(text + "\n")

    def write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        self.write(("\r\x1b[K" if self.bar else "") + text + "\n")
