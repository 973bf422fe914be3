"""What the user named -> named sources, each with its files in a fixed order.

Called by `build`, `show` and `validate.command`. Each argument is one source: a file, a glob, a directory, an
fsspec URL, `NAME=PATH`, or a mapping from a config file.
"""

from __future__ import annotations

import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from dft_common.errors import SetupError
from dft_prep.reconcile.reading import AS_FOUND, READING_KEYS, Reading, parse_reading

_NAMED = re.compile(r"([A-Za-z0-9._-]+)=(.+)", re.DOTALL)
_DATA_SUFFIX = re.compile(r"\.(jsonl?|ndjson|parquet)(\.(gz|zst|xz))?$", re.IGNORECASE)
_HERE = re.compile(r"^(?:\./+)+(?=.)", re.DOTALL)
_DEEP = re.compile(r"(.*?/|)\*\*(?:/(.*)|)", re.DOTALL)
"""A pattern with a `**`: (what is before it, what is after it)."""
_KEYS = ("name", "path", "split", "max_conversations", *READING_KEYS)


class SourceFile(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    """What is opened: a local path or an fsspec URL."""
    shown: str
    """As the user would name it, for findings."""
    relative: str
    """Relative to what the user named: the same wherever the corpus lies."""
    size: int
    stamp: tuple[int, int, int] | None = None
    """Of a local file: what tells whether it is still the same."""


def stamp_of(status: os.stat_result) -> tuple[int, int, int]:
    """(size, time of the last change in ns, inode)"""
    return status.st_size, status.st_mtime_ns, status.st_ino


class Source(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    files: tuple[SourceFile, ...]
    split: Literal["train", "validation"] | None = None
    """Where all of it goes, or None: by content hash."""
    max_conversations: int | None = None
    reading: Reading = AS_FOUND


def is_url(path: str) -> bool:
    return "://" in path


def resolve_sources(arguments: Sequence[Any]) -> list[Source]:
    """The sources that `--data_files` names. Raises SetupError where one names nothing that can be read."""
    if not arguments:
        raise SetupError("--data_files is missing", remedy="give files, globs or directories")
    parsed = [_parse(argument) for argument in arguments]
    given = Counter(mapping["name"] for mapping in parsed if "name" in mapping)
    for name, times in given.items():
        if times > 1:
            raise SetupError(f"--data_files: {times} sources are named {name!r}", remedy="give each its own name")
    sources: list[Source] = []
    taken = set(given)
    for mapping in parsed:
        path = mapping["path"]
        name = mapping.get("name") or _free_name(_default_name(path), taken)
        taken.add(name)
        sources.append(
            Source(
                name=name,
                files=tuple(_find(path)),
                split=mapping.get("split"),
                max_conversations=mapping.get("max_conversations"),
                reading=parse_reading(mapping),
            )
        )
    return sources


def _parse(argument: Any) -> dict[str, Any]:
    if isinstance(argument, dict):
        return _check_mapping(argument)
    path = str(argument)
    match = _NAMED.fullmatch(path)
    if match and not os.path.lexists(path) and not is_url(path.split("=", 1)[0]):
        return {"name": match[1], "path": match[2]}
    return {"path": path}


def _check_mapping(mapping: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(mapping) - set(_KEYS))
    if unknown or not isinstance(mapping.get("path"), str):
        found = f"unknown key {unknown[0]!r}" if unknown else "no `path`"
        raise SetupError(f"data_files: {found} in {mapping}", remedy=f"the keys are {', '.join(_KEYS)}")
    if mapping.get("split") not in (None, "train", "validation"):
        raise SetupError(f"data_files: split {mapping['split']!r}", remedy="it is train or validation")
    limit = mapping.get("max_conversations")
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise SetupError(f"data_files: max_conversations {limit!r}", remedy="give a number above 0")
    return {key: value for key, value in mapping.items() if value is not None}


def _default_name(path: str) -> str:
    """`data/chat.jsonl.gz` -> `chat`; a directory's own name; what is odd in it becomes `_`."""
    base = _DATA_SUFFIX.sub("", path.rstrip("/").rsplit("/", 1)[-1])
    return re.sub(r"[^A-Za-z0-9._-]+", "_", base).strip("_.") or "source"


def _free_name(name: str, taken: set[str]) -> str:
    number, free = 2, name
    while free in taken:
        free, number = f"{name}-{number}", number + 1
    return free


def _find(path: str) -> list[SourceFile]:
    if is_url(path):
        return _find_url(path)
    if not os.path.lexists(path):
        # A shell expands no `~` behind `NAME=`, and a config file has no shell.
        path = os.path.expanduser(path)  # noqa: PTH111  # Path would raise where there is no such user
    if os.path.isdir(path):  # noqa: PTH112  # Path would raise for a name that is too long
        return _find_in_directory(path)
    if os.path.lexists(path):
        return [_local_file(path, Path(path).name)]
    if glob.has_magic(path):
        found = sorted(set(_glob(path)))
        if not found:
            raise SetupError(
                f"--data_files {path}: no file matches", remedy="check the pattern; quote it from the shell"
            )
        root = os.path.commonpath([str(Path(item).parent) for item in found])
        return [_local_file(item, os.path.relpath(item, root)) for item in found]
    raise SetupError(f"--data_files {path}: there is no such file", remedy="check the path")


def _glob(pattern: str) -> Iterator[str]:
    """The files that `pattern` matches. A `**` does not follow links to directories, which may lead back up."""
    deep = _DEEP.fullmatch(pattern)
    if deep is None:
        yield from (item for item in glob.glob(pattern) if not Path(item).is_dir())
        return
    before, after = deep[1], deep[2] or "*"
    for top in glob.glob(before) if before else ["."]:
        for root, folders, _ in os.walk(top):
            folders[:] = [folder for folder in folders if not folder.startswith(".")]
            here = root if before else os.path.relpath(root)
            yield from _glob(after if here == "." else os.path.join(glob.escape(here), after))  # noqa: PTH118


def _find_in_directory(directory: str) -> list[SourceFile]:
    """Every data file below `directory`, by path. Links to directories are not followed, so that none can loop."""
    found = []
    unreadable: list[str] = []
    for root, folders, names in os.walk(directory, onerror=lambda error: unreadable.append(str(error.filename))):
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        found += [os.path.join(root, name) for name in names if _DATA_SUFFIX.search(name) and name[0] != "."]  # noqa: PTH118
    found += unreadable  # folders: reading them will say why
    if not found:
        raise SetupError(
            f"--data_files {directory}: no data file in this directory",
            remedy="it should hold .json, .jsonl, .ndjson or .parquet files, plain or as .gz, .zst or .xz",
        )
    return [_local_file(item, os.path.relpath(item, directory)) for item in sorted(found)]


def _local_file(path: str, relative: str) -> SourceFile:
    """One that cannot be opened is a file all the same: reading it will say why, among the other findings."""
    # One name for a file however it was found: what annotations point to, and what a baseline knows.
    shown, relative = _text(_HERE.sub("", path)), _text(Path(relative).as_posix())
    try:
        status = Path(path).stat()
    except OSError:
        return SourceFile(path=path, shown=shown, relative=relative, size=0)
    if stat.S_ISDIR(status.st_mode):
        return SourceFile(path=path, shown=shown, relative=relative, size=0)
    if not stat.S_ISREG(status.st_mode):
        raise SetupError(f"--data_files {path}: not a regular file", remedy="write the data to a file first")
    return SourceFile(path=path, shown=shown, relative=relative, size=status.st_size, stamp=stamp_of(status))


def _text(path: str) -> str:
    """`path` as text that can be encoded, whatever bytes the file's name has."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _find_url(url: str) -> list[SourceFile]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
        paths = sorted(system.find(path)) if system.isdir(path) else sorted(system.glob(path))
        if system.isdir(path):
            paths = [item for item in paths if _DATA_SUFFIX.search(item)]
        sizes = [int(system.size(item) or 0) for item in paths]
    except ImportError as error:
        raise SetupError(f"--data_files {url}: {error}", remedy="install the package that it names") from None
    except Exception as error:  # drivers raise errors of many kinds of their own
        reason = str(error) or type(error).__name__
        raise SetupError(f"--data_files {url}: {reason}", remedy="check the URL and your access") from None
    if not paths:
        raise SetupError(f"--data_files {url}: no file matches", remedy="check the URL")
    root = os.path.commonpath([item.rsplit("/", 1)[0] for item in paths])
    return [
        SourceFile(
            path=system.unstrip_protocol(item),
            shown=system.unstrip_protocol(item),
            relative=item[len(root) :].lstrip("/"),
            size=size,
        )
        for item, size in zip(paths, sizes, strict=True)
    ]
