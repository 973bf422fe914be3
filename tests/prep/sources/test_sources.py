from __future__ import annotations

import os
import subprocess
import sys

import fsspec
import pytest

from dft_common.errors import SetupError
from dft_prep.sources.files import FileError
from dft_prep.sources.named import resolve_sources
from dft_prep.sources.units import plan_units

LINE = b'{"messages": []}\n'


@pytest.fixture(autouse=True)
def corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "a.json", "deep/c.jsonl.gz", "deep/er/d.parquet", "deep/e.ndjson.zst"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(LINE)
    for name in ("README.md", ".hidden.jsonl", ".git/x.jsonl"):
        path = tmp_path / "data" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(LINE)
    return tmp_path


def shown(argument) -> list[str]:
    return [file.shown for file in resolve_sources([argument])[0].files]


def test_a_file_is_named_by_its_stem_and_a_suffix_does_not_matter_then():
    (source,) = resolve_sources(["data/README.md"])
    (file,) = source.files
    assert (file.path, file.shown, file.relative, file.size) == ("data/README.md", "data/README.md", "README.md", 17)
    assert [source.name for source in resolve_sources(["data/b.jsonl", "data/deep/c.jsonl.gz"])] == ["b", "c"]


def test_a_directory_gives_its_data_files_in_order_and_no_hidden_ones():
    (source,) = resolve_sources(["data"])
    assert source.name == "data"
    assert [file.relative for file in source.files] == [
        "a.json",
        "b.jsonl",
        "deep/c.jsonl.gz",
        "deep/e.ndjson.zst",
        "deep/er/d.parquet",
    ]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("data/*.json*", ["data/a.json", "data/b.jsonl"]),
        ("data/?.jsonl", ["data/b.jsonl"]),
        ("**/*.jsonl", ["data/b.jsonl"]),
        ("data/**/*.gz", ["data/deep/c.jsonl.gz"]),
        ("data/**/*.json*", ["data/a.json", "data/b.jsonl", "data/deep/c.jsonl.gz"]),
        ("data/deep/**", ["data/deep/c.jsonl.gz", "data/deep/e.ndjson.zst", "data/deep/er/d.parquet"]),
        ("**/deep/**/d.*", ["data/deep/er/d.parquet"]),
    ],
)
def test_a_glob_is_sorted_and_names_files_as_the_user_would(pattern, expected):
    assert shown(pattern) == expected


def test_a_link_that_leads_back_up_gives_no_file_twice(corpus):
    (corpus / "data" / "deep" / "up").symlink_to("..")
    (corpus / "data" / "deep" / "up2").symlink_to("..")
    assert shown("data/**/b.jsonl") == ["data/b.jsonl"]
    assert len(shown("data")) == 5


def test_name_equals_path_names_a_source_unless_such_a_path_is_there(corpus):
    (named,) = resolve_sources(["chat=data/b.jsonl"])
    assert (named.name, named.files[0].shown) == ("chat", "data/b.jsonl")
    (corpus / "chat=data.jsonl").write_bytes(LINE)
    (as_is,) = resolve_sources(["chat=data.jsonl"])
    assert as_is.files[0].shown == "chat=data.jsonl"


def test_sources_of_one_name_are_numbered_and_given_names_come_first():
    names = [source.name for source in resolve_sources(["data/b.jsonl", "data/b.jsonl", "b=data/a.json"])]
    assert names == ["b-2", "b-3", "b"]
    with pytest.raises(SetupError, match="'x'"):
        resolve_sources(["x=data/a.json", "x=data/b.jsonl"])


def test_a_mapping_may_set_the_split_and_a_limit():
    (source,) = resolve_sources([{"name": "v", "path": "data", "split": "validation", "max_conversations": 7}])
    assert (source.name, source.split, source.max_conversations, len(source.files)) == ("v", "validation", 7, 5)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"path": "data", "wieght": 2}, "wieght"),
        ({"name": "x"}, "path"),
        ({"path": "data", "split": "test"}, "test"),
        ({"path": "data", "max_conversations": 0}, "max_conversations"),
        ("nowhere.jsonl", "nowhere.jsonl"),
        ("x*.jsonl", "x*.jsonl"),
        ("empty", "empty"),
        ("nothing", "nothing"),
        ("pipe", "not a regular file"),
        ("nosuch://bucket/a.jsonl", "nosuch"),
        ("memory://nothing-there/*.jsonl", "no file matches"),
    ],
)
def test_what_is_not_there_is_a_usage_error_with_a_remedy(corpus, argument, message):
    (corpus / "empty").mkdir()
    (corpus / "nothing").mkdir()
    (corpus / "nothing" / "notes.txt").write_text("x")
    os.mkfifo(corpus / "pipe")
    with pytest.raises(SetupError) as raised:
        resolve_sources([argument])
    assert message in raised.value.message
    assert raised.value.remedy


def test_a_file_that_cannot_be_opened_is_told_when_it_is_read(corpus):
    """So that a validation reports it among its findings."""
    (corpus / "data" / "dangling.jsonl").symlink_to("gone")
    (corpus / "data" / "loop.jsonl").symlink_to("loop.jsonl")
    (corpus / "data" / "secret.jsonl").write_text("{}")
    (corpus / "data" / "secret.jsonl").chmod(0)
    (source,) = resolve_sources(["data"])
    files = {file.relative: file for file in source.files}
    unreadable = ["dangling.jsonl", "loop.jsonl", *(["secret.jsonl"] if os.geteuid() else [])]
    for name in unreadable:
        with pytest.raises(FileError) as refusal:
            plan_units(files[name], "data")
        assert refusal.value.code == "unreadable_file"
        assert name in refusal.value.message


def test_a_missing_driver_is_named():
    code = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from dft_prep.sources.named import resolve_sources\n"
        "from dft_common.errors import SetupError\n"
        "try: resolve_sources(['s3://bucket/a.jsonl'])\n"
        "except SetupError as error: print(error.message)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "s3fs" in done.stdout


def test_urls_are_listed_by_their_driver():
    system = fsspec.filesystem("memory")
    system.pipe({"/corpus/b.jsonl": LINE, "/corpus/a.jsonl": LINE, "/corpus/notes.md": b"x"})
    try:
        assert shown("memory://corpus/b.jsonl") == ["memory:///corpus/b.jsonl"]
        (source,) = resolve_sources(["memory://corpus"])
        assert [(file.relative, file.size) for file in source.files] == [("a.jsonl", 17), ("b.jsonl", 17)]
        assert [file.relative for file in resolve_sources(["memory://corpus/*.jsonl"])[0].files] == [
            "a.jsonl",
            "b.jsonl",
        ]
    finally:
        system.rm("/corpus", recursive=True)


def test_a_file_name_that_is_not_utf8_can_still_be_written_down(corpus):
    name = os.fsdecode(b"bad\xff.jsonl")
    (corpus / name).write_bytes(LINE)
    (file,) = resolve_sources([name])[0].files
    assert file.path == name
    assert (file.shown, file.relative) == ("bad\\xff.jsonl", "bad\\xff.jsonl")


@pytest.mark.parametrize("argument", ["a.jsonl", "./a.jsonl", ".", ".//a.jsonl", "./*.jsonl"])
def test_a_file_has_one_name_however_it_was_found(corpus, monkeypatch, argument):
    (corpus / "alone").mkdir()
    monkeypatch.chdir(corpus / "alone")
    (corpus / "alone" / "a.jsonl").write_bytes(LINE)
    assert shown(argument) == ["a.jsonl"]


def test_a_name_that_no_file_can_have_is_no_such_file():
    with pytest.raises(SetupError, match="no such file"):
        resolve_sources(["a" * 5000])
