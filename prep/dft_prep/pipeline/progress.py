"""Progress of a long command: a bar on a terminal, a plain line now and then otherwise. On stderr.

Called by `build` and `validate`.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from dft_common.logs import get_logger

_PLAIN_EVERY_SECONDS = 10.0


def duration(seconds: float) -> str:
    """`75` -> `1:15`; `3725` -> `1:02:05`."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Bytes done of all, with conversations and tokens a second and the time left."""

    def __init__(self, total_bytes: int) -> None:
        self.total = max(1, total_bytes)
        self.done = self.conversations = self.tokens = 0
        self._started = self._said = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar, self._task = self._make_bar()

    def _make_bar(self):  # rich is imported only where a terminal shows it
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"))
        bar = Bar(*columns, console=Console(stderr=True), transient=True)
        return bar, bar.add_task("starting", total=self.total)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, size: int, conversations: int, tokens: int) -> None:
        """`size` more bytes are done, which held so many conversations and tokens."""
        self.done += size
        self.conversations += conversations
        self.tokens += tokens
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, description=self.line(now))
        elif now - self._said >= _PLAIN_EVERY_SECONDS:
            self._said = now
            get_logger().info("%3.0f %%  %s", 100 * self.done / self.total, self.line(now))

    def line(self, now: float) -> str:
        seconds = max(now - self._started, 1e-6)
        left = seconds * (self.total - self.done) / max(self.done, 1)
        return (
            f"{self.conversations:,} conversations, {self.conversations / seconds:,.0f}/s, "
            f"{self.tokens / seconds:,.0f} tokens/s, {duration(left)} left"
        )
