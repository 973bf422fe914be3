"""Reads the next optimizer step's batches while this one is computed. Used by `loop`, for training and evaluation.

A batch is some hundred kilobytes of integers, and reading one is some thousand short operations of Python and
numpy, on which an accelerator would wait. So a thread reads ahead, of what a DataLoader's iterator gives: the same
batches in the same order. Where the DataLoader has processes of its own (--dataloader_num_workers), those read ahead,
and there is no thread.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
THREAD_NAME = "dft-train-reads-ahead"


class _End:
    """Behind the last item: the iterator's end, or its error."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class _Shelf(Generic[T]):
    """What the thread has read and nobody has taken. Never more than `room` items, and none is read without room."""

    def __init__(self, room: int) -> None:
        self.changed = threading.Condition()
        self.items: deque[T | _End] = deque()
        self.room = room
        self.closed = False

    def wait_for_room(self) -> bool:
        """False: nobody wants more."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or len(self.items) < self.room)
            return not self.closed

    def put(self, item: T | _End) -> None:
        with self.changed:
            self.items.append(item)
            self.changed.notify_all()

    def take(self) -> T | _End:
        with self.changed:
            self.changed.wait_for(lambda: len(self.items) > 0)
            item = self.items.popleft()
            self.changed.notify_all()
            return item

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()


def _fill(shelf: _Shelf[T], source: Iterator[T], device: int | None) -> None:
    """The thread."""
    error = None
    try:
        if device is not None:
            # Pinning memory opens the thread's current device, which would be the first of the machine.
            torch.accelerator.set_device_index(device)
        while shelf.wait_for_room():
            shelf.put(next(source))
    except StopIteration:
        pass
    except BaseException as caught:
        error = caught
    shelf.put(_End(error))


def read_ahead(source: Iterator[T], room: int) -> Iterator[T]:
    """The items of `source`, up to `room` of them ready before they are asked for.

    An error of `source` is raised where its item would have come. The thread ends with this iterator: when it is
    exhausted, closed, or dropped.
    """
    if getattr(source, "_num_workers", 0):
        yield from source
        return
    shelf: _Shelf[T] = _Shelf(room)
    device = torch.accelerator.current_device_index() if getattr(source, "_pin_memory", False) else None
    thread = threading.Thread(target=_fill, args=(shelf, source, device), name=THREAD_NAME, daemon=True)
    thread.start()
    try:
        while not isinstance(item := shelf.take(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        shelf.close()
        thread.join()


class StepReader:
    """Takes the micro-batches of one optimizer step after the other, of one epoch's iterator after the other."""

    def __init__(self) -> None:
        self._source: Any = None
        self._ahead: Any = None

    def take(self, source: Iterator[T], count: int) -> list[T]:
        """The next `count` items of `source`, fewer at its end; as many again are read meanwhile."""
        if source is not self._source:
            self.close()
            self._source, self._ahead = source, read_ahead(source, count)
        return list(itertools.islice(self._ahead, count))

    def close(self) -> None:
        """No thread is left behind. To be called when a run ends, whichever way."""
        if self._ahead is not None:
            self._ahead.close()
        self._source = self._ahead = None
