"""A Parquet file -> its rows as dicts, in batches of little memory.

Called by `readers`. No schema is kept: each row has the values that its columns hold.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from dft_prep.sources.files import Compression, FileError, Truncated, check_growth, decompressed, open_raw
from dft_prep.sources.named import SourceFile

_COPIED = 1 << 20
_MOST_ROWS, _FIRST_ROWS = 1000, 8
_BATCH_BYTES = 32 << 20
"""Of a batch in Arrow's form, about: as Python's objects it takes several times as much."""


def parquet_rows(file: SourceFile, compression: Compression) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """Every row, in order; one whose text is not UTF-8 as the error. Raises FileError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_raw(file) as raw, tempfile.TemporaryFile() as unpacked:
        try:
            seekable: Any = raw
            if compression != "none":
                # Parquet is read from its end, which a compressed stream cannot do.
                shutil.copyfileobj(decompressed(raw, file, compression), unpacked, _COPIED)
                seekable = unpacked
            for batch in _batches(file, pq.ParquetFile(seekable), seekable.seek(0, 2)):
                yield from _dicts(batch)
        # ValueError too: names of columns that are not UTF-8, types that pyarrow does not make.
        except (pa.ArrowException, OSError, Truncated, ValueError, OverflowError) as error:
            raise FileError(
                "corrupt_parquet",
                f"{file.shown}: cannot be read as Parquet: {error}",
                remedy="write the file again, or take it out",
            ) from None


def _batches(file: SourceFile, table: Any, packed: int) -> Iterator[Any]:
    """packed: bytes of the file. Raises FileError where the columns grow beyond all measure."""
    groups = range(table.metadata.num_row_groups)
    check_growth(file, sum(table.metadata.row_group(group).total_byte_size for group in groups), packed)
    unpacked = 0
    for group in groups:
        for batch in table.iter_batches(batch_size=_rows_in_batch(table, group), row_groups=[group]):
            # Once more: a value that a dictionary holds once, and the metadata counts once, may stand in every row.
            unpacked += batch.nbytes
            check_growth(file, unpacked, packed)
            yield batch


def _rows_in_batch(table: Any, group: int) -> int:
    """As many as fit, if all are as the first ones."""
    if table.metadata.row_group(group).num_rows <= _FIRST_ROWS:
        return _FIRST_ROWS
    first = next(table.iter_batches(batch_size=_FIRST_ROWS, row_groups=[group]))
    return max(1, min(_MOST_ROWS, _BATCH_BYTES * first.num_rows // max(1, first.nbytes)))


def _dicts(batch: Any) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """The rows of a batch; a row whose text is not UTF-8 as the error, and none but that row."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):  # a UnicodeDecodeError is a ValueError
        for row in range(batch.num_rows):
            try:
                yield {name: _to_python(column[row]) for name, column in zip(batch.schema.names, batch, strict=True)}
            except UnicodeDecodeError as error:
                yield error


def _to_python(scalar: Any) -> Any:
    """A value of Arrow; a time that Python cannot hold (of nanoseconds, or after the year 9999) as its number."""
    import pyarrow as pa

    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        raise
    except (ValueError, OverflowError):
        if isinstance(scalar, pa.StructScalar):
            return {name: _to_python(scalar[name]) for name in scalar}
        if isinstance(scalar, pa.ListScalar):
            return [_to_python(item) for item in scalar.values]
        return scalar.value
