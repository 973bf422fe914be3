"""The output directory while a build is under way: its lock, its finished parts, and the one moment of publishing.

Called by `build`. Unfinished work lives in OUT/.work; what a reader may trust changes only in `publish`,
which writes the manifest last. A build that is killed at any moment leaves either the old dataset or
something without a manifest, and its parts for the next one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from dft_common.errors import SetupError
from dft_common.manifest import Manifest, write_manifest
from dft_common.schema import (
    DATASET_DICT_NAME,
    MANIFEST_NAME,
    PACKS_DIR,
    QUARANTINE_NAME,
    REPORT_NAME,
    SPLITS,
    TOKENIZER_DIR,
    WORK_DIR,
)

_PUBLISHED = (*SPLITS, PACKS_DIR, TOKENIZER_DIR, DATASET_DICT_NAME, QUARANTINE_NAME, REPORT_NAME)


class Workspace:
    """OUT/.work, locked for this process."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.work = output_dir / WORK_DIR
        self.parts = self.work / "parts"
        self.new = self.work / "new"
        self.finished_before: set[str] = set()
        """Keys of the parts that an earlier build left."""
        self._lock: int | None = None

    def open(self, *, resume: bool) -> None:
        """Make and lock the directory. Raises SetupError where it is not ours to write to."""
        self._refuse_foreign()
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.work / "lock", os.O_CREAT | os.O_RDWR)
        except OSError as error:
            raise SetupError(
                f"--output_dir {self.output_dir}: cannot be written: {error.strerror}",
                remedy="give a directory that you may write to",
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SetupError(
                f"--output_dir {self.output_dir}: another build is writing to it",
                remedy="wait until it ends, or give another directory",
            ) from None
        shutil.rmtree(self.new, ignore_errors=True)
        if not resume:
            shutil.rmtree(self.parts, ignore_errors=True)
        self.parts.mkdir(exist_ok=True)
        self.finished_before = {path.stem for path in self.parts.glob("*.json")}
        for leftover in self.parts.glob("*.tmp"):
            leftover.unlink()
        self.new.mkdir()

    def _refuse_foreign(self) -> None:
        if self.output_dir.is_file():
            raise SetupError(f"--output_dir {self.output_dir}: this is a file", remedy="give a directory")
        if not self.output_dir.is_dir() or (self.output_dir / MANIFEST_NAME).exists() or self.work.exists():
            return
        # A folder named train may be anything: only a quarantine is left by a build that failed.
        foreign = sorted(item.name for item in self.output_dir.iterdir() if item.name != QUARANTINE_NAME)
        if foreign:
            raise SetupError(
                f"--output_dir {self.output_dir}: holds files that are no dataset's ({foreign[0]!r})",
                remedy="give a new or an empty directory",
            )

    def first_start(self, today: str) -> str:
        """The day on which the build that is going on here was first started."""
        path = self.work / "date"
        if not path.exists():
            path.write_text(today, "utf-8")
        return path.read_text("utf-8").strip()

    def publish(self, manifest: Manifest) -> None:
        """Put what lies in `new` in place of what was there, and write the manifest, last of all."""
        (self.output_dir / MANIFEST_NAME).unlink(missing_ok=True)
        for name in _PUBLISHED:
            old, new = self.output_dir / name, self.new / name
            if old.is_dir():
                shutil.rmtree(old)
            else:
                old.unlink(missing_ok=True)
            if new.exists():
                new.replace(old)
        write_manifest(self.output_dir, manifest)
        shutil.rmtree(self.work)

    def close(self) -> None:
        """Release the lock. Finished parts of a build that did not end stay, for the next one."""
        if self._lock is None:
            return
        if self.parts.is_dir() and not any(self.parts.iterdir()):
            shutil.rmtree(self.work)
        os.close(self._lock)
        self._lock = None
