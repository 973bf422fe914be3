"""Logging for one process or many: rank 0 says what happens, other ranks only warn.

Every line goes to stderr (stdout carries only what a program would read) and, in a run of several
ranks, names its rank. Both commands call `setup` once.
"""

from __future__ import annotations

import logging
import os
import sys

from dft_common.errors import log_safe

LOGGER_NAME = "dft"


class _Formatter(logging.Formatter):
    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self.prefix = f"[rank {rank}] " if world_size > 1 else ""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        text = log_safe(record.getMessage())
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return f"{self.prefix}{level}{text}"


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of ranks, from the launcher's environment (0 and 1 without one)."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def setup(level: int = logging.INFO) -> logging.Logger:
    """Configure and return the toolkit's logger. Calling it again replaces the handler."""
    rank, world_size = rank_and_world_size()
    logger = logging.getLogger(LOGGER_NAME)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(rank, world_size))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(level if rank == 0 else max(level, logging.WARNING))
    return logger


def get_logger() -> logging.Logger:
    """The toolkit's logger; silent below warnings until `setup` was called."""
    return logging.getLogger(LOGGER_NAME)
