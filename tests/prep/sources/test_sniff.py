from __future__ import annotations

import gzip
import io
import zipfile

import pytest

from dft_prep.sources.files import FileError
from dft_prep.sources.named import resolve_sources
from dft_prep.sources.readers import UnitReader
from dft_prep.sources.units import Unit, plan_units

GOOD = b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'


@pytest.fixture
def plan(tmp_path):
    def run(data: bytes, name: str = "odd.jsonl") -> Unit:
        (tmp_path / name).write_bytes(data)
        (source,) = resolve_sources([str(tmp_path / name)])
        (unit,) = plan_units(source.files[0], source.name)
        return unit

    return run


def refusal(plan, data: bytes) -> FileError:
    with pytest.raises(FileError) as raised:
        plan(data)
    assert "odd.jsonl" in raised.value.message
    assert raised.value.remedy
    return raised.value


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.jsonl", GOOD)
    return out.getvalue()


KINDS = {
    "a PNG": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "other_kind", "a PNG picture"),
    "a zip": (zipped(), "other_kind", "a zip archive"),
    "a gzipped zip": (gzip.compress(zipped()), "other_kind", "a zip archive"),
    "a tar": (b"a.jsonl".ljust(257, b"\0") + b"ustar\x0000".ljust(255, b"\0"), "other_kind", "a tar archive"),
    "an SQLite database": (b"SQLite format 3\0", "other_kind", "an SQLite database"),
    "HTML": (b"<!doctype html><title>404</title>", "other_kind", "an HTML page"),
    "lists of messages, one a line": (
        b'[{"role": "user"}]\n[{"role": "user"}]\n',
        "other_kind",
        "each line is an array",
    ),
    "CSV": (b"question,answer\nq,a\n", "other_kind", "expected JSON records"),
    "an array": (b"[" + GOOD + b",\n" + GOOD + b"]", "array_in_jsonl", "one JSON array"),
}
WIDE = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]


@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_is_named_jsonl_and_is_not_is_said_to_be_what_it_is(plan, name):
    data, code, message = KINDS[name]
    found = refusal(plan, data)
    assert found.code == code
    assert message in found.message


@pytest.mark.parametrize("encoding", WIDE)
@pytest.mark.parametrize("text", ["{}", '{"a": "é你😀"}\n{"b": 1}\n', "[1]"])
def test_wide_encodings_are_named_with_the_command_that_converts_them(plan, encoding, text):
    found = refusal(plan, text.encode(encoding))
    assert found.code == "utf16"
    name = found.message.split("this is ")[1].split(",")[0]
    assert f"iconv -f {name} -t UTF-8 < " in found.remedy
    assert text.encode(encoding).decode(name).removeprefix("\ufeff") == text


def test_a_file_of_nul_bytes_is_no_wide_text(plan):
    """What a file system leaves of a file that was being written when the power failed."""
    found = refusal(plan, bytes(5000))
    assert found.code == "other_kind"
    bad, good = UnitReader(plan(bytes(3) + GOOD[:40] + b"\n" + GOOD + b"\n"))
    assert good.data == GOOD
    assert bad.line == 1
