"""`--decontaminate FILES`: the words that must not appear in training, from files of conversations or plain text.

`load_ngrams` is called once, by `build` and `validate.command`; the `Ngrams` that it hands on are asked for every
conversation, which is left out with the code `contaminated`.
"""

from __future__ import annotations

import codecs
import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import msgspec

from dft_common.errors import DataError, SetupError
from dft_common.records import Conversation, Finding
from dft_prep.judge.judgement import Judge
from dft_prep.judge.ngrams import FEWEST_WORDS, Ngrams, make_ngrams, words_of
from dft_prep.sources.files import FileError, Truncated, compression_of, decompressed, open_raw
from dft_prep.sources.named import SourceFile, resolve_sources
from dft_prep.sources.readers import RawRecord, UnitReader
from dft_prep.sources.sniff import sniff
from dft_prep.sources.units import plan_units

_SNIFFED = 1 << 16
_TEXT_SUFFIXES = (".txt", ".txt.gz", ".txt.zst", ".txt.xz", ".md")
_INSTRUCTIONS = ("system", "developer")
_DEPTH = 32


def load_ngrams(paths: Sequence[str]) -> Ngrams:
    """The runs of words of every text in the files. Raises DataError or SetupError for one that holds none.

    Of a conversation: every turn but system and developer turns, which test and training data share on purpose. Of a
    JSON record that is no conversation, as benchmarks have them: every text in it. Of plain text: every paragraph.
    """
    if not paths:
        return make_ngrams([])
    try:
        sources = resolve_sources(paths)
    except SetupError as error:
        raise SetupError(error.message.replace("--data_files", "--decontaminate"), remedy=error.remedy) from None
    return make_ngrams(text for source in sources for file in source.files for text in _long_texts(file))


def _long_texts(file: SourceFile) -> Iterator[str]:
    """The file's texts. Raises DataError, at its end, where none was long enough to be compared."""
    some = False
    for text in _texts(file):
        some = some or len(words_of(text)) >= FEWEST_WORDS
        yield text
    if not some:
        raise DataError(
            f"--decontaminate {file.shown}: no text of {FEWEST_WORDS} words or more",
            remedy="give files of conversations, or of plain text",
        )


def _texts(file: SourceFile) -> Iterator[str]:
    if file.path.lower().endswith(_TEXT_SUFFIXES):
        return _paragraphs(file)
    try:
        sniff(file)
    except FileError as error:
        if error.code != "other_kind" or not _is_text(file):
            raise
        return _paragraphs(file)
    return _record_texts(file)


# Plain text


@contextlib.contextmanager
def _opened(file: SourceFile) -> Iterator[BinaryIO]:
    with open_raw(file) as raw:
        compression = compression_of(raw.read(8))
        raw.seek(0)
        try:
            yield decompressed(raw, file, compression)
        except Truncated as error:
            raise DataError(f"--decontaminate {file.shown}: {error}", remedy="fetch or write it again") from None


def _is_text(file: SourceFile) -> bool:
    """Whether a file that is no JSON begins as UTF-8 text does."""
    with _opened(file) as stream:
        head = stream.read(_SNIFFED)
    try:
        # What was read may end inside a character.
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head and not head.startswith(b"%PDF")


def _paragraphs(file: SourceFile) -> Iterator[str]:
    """The stretches between blank lines."""
    with _opened(file) as stream:
        lines: list[str] = []
        try:
            for line in io.TextIOWrapper(stream, "utf-8"):
                if line.strip():
                    lines.append(line)
                elif lines:
                    yield "".join(lines)
                    lines = []
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise DataError(
                f"--decontaminate {file.shown}: byte 0x{byte:02x} is not UTF-8", remedy="convert the file to UTF-8"
            ) from None
        if lines:
            yield "".join(lines)


# Records


def _record_texts(file: SourceFile) -> Iterator[str]:
    for unit in plan_units(file, "decontaminate"):
        judge = Judge(file.shown)
        for raw in UnitReader(unit):
            judged = judge(raw)
            if not isinstance(judged, Finding):
                yield from _conversation_texts(judged.conversation)
            elif (value := _decoded(raw)) is not None:
                yield from _all_texts(value, 0)
            else:
                raise DataError(
                    f"--decontaminate {judged.file}: {judged.code} at byte {judged.byte_offset:,}: {judged.message}",
                    remedy=judged.help,
                )


def _conversation_texts(conversation: Conversation) -> Iterator[str]:
    for message in conversation.messages:
        if message.role not in _INSTRUCTIONS:
            yield from (text for text in (message.reasoning, message.content) if text)


def _decoded(raw: RawRecord) -> Any:
    """What is in a record that is JSON, and no conversation; None where it cannot be read."""
    if raw.problem is not None:
        return None
    if isinstance(raw.data, dict):
        return raw.data
    try:
        return msgspec.json.decode(raw.data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _all_texts(value: Any, depth: int) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif depth < _DEPTH and isinstance(value, list):
        for item in value:
            yield from _all_texts(item, depth + 1)
    elif depth < _DEPTH and isinstance(value, dict):
        if value.get("role") in _INSTRUCTIONS or value.get("from") in _INSTRUCTIONS:
            return
        for key, item in value.items():
            if key not in _INSTRUCTIONS:
                yield from _all_texts(item, depth + 1)
