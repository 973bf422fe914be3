"""A validation as a whole, in this process: order, places, limits, agreement with a build's judgement."""

from __future__ import annotations

import gzip
import json
import random

import pytest

import tiny
from dft_common.errors import SetupError
from dft_prep.codes.severities import Severities
from dft_prep.judge.ngrams import make_ngrams
from dft_prep.pipeline import engine
from dft_prep.sources import readers, units
from dft_prep.sources.named import resolve_sources
from dft_prep.validate.command import ValidateOptions, run_validate
from dft_prep.validate.survey import Room, SurveyContext, SurveyJob

GOOD = [json.dumps(record).encode() for record in tiny.numbered(400)]
NO_REPLY = json.dumps({"messages": tiny.turns("nobody answers")}).encode()
BROKEN = b'{"messages": ['


@pytest.fixture
def validate(tmp_path, monkeypatch, capsys):
    """Validate files in tmp_path with small work units; returns (exit code, what --format json says)."""
    monkeypatch.setattr(units, "UNIT_BYTES", 1000)
    monkeypatch.chdir(tmp_path)

    def run(*files: str, **options):
        code = run_validate(ValidateOptions(data_files=files, format="json", **options))
        return code, json.loads(capsys.readouterr().out)

    return run


def places(found: dict, code: str | None = None) -> list[tuple[str, int]]:
    return [
        (finding["file"], finding["line"]) for finding in found["findings"] if code is None or finding["code"] == code
    ]


def write(path, lines: list[bytes]) -> None:
    path.write_bytes(b"".join(line + b"\n" for line in lines))


@pytest.mark.parametrize("workers", [1, 2])
def test_findings_come_in_the_order_of_files_and_lines_whatever_finishes_first(
    validate, tmp_path, monkeypatch, workers
):
    monkeypatch.setattr(engine, "_POOL_FROM_BYTES", 0)
    chance = random.Random(0)
    expected = []
    for name in ("b.jsonl", "a.jsonl"):
        lines = list(GOOD)
        for at in sorted(chance.sample(range(len(lines)), 40)):
            lines[at] = chance.choice([NO_REPLY, BROKEN])
            expected.append((name, at + 1))
        lines.insert(7, b"")
        expected = [(file, line + (file == name and line > 7)) for file, line in expected]
        write(tmp_path / name, lines)
    code, found = validate(
        "b.jsonl", "a.jsonl", max_errors=1000, preprocessing_num_workers=workers, ignore=("duplicate",)
    )
    errors = [finding for finding in found["findings"] if finding["severity"] == "error"]
    assert code == 1
    assert [(finding["file"], finding["line"]) for finding in errors] == expected
    data = {name: (tmp_path / name).read_bytes() for name in ("a.jsonl", "b.jsonl")}
    for finding in errors:
        before = data[finding["file"]][: finding["byte_offset"]]
        assert before.count(b"\n") + 1 == finding["line"]
    assert (found["summary"]["records"], found["summary"]["good"]) == (800, 720)


def test_duplicates_are_named_within_and_across_files_and_shapes(validate, tmp_path):
    sharegpt = {"conversations": [{"from": "human", "value": "What is 3 + 1?"}, {"from": "gpt", "value": "x"}]}
    openai = {"messages": tiny.turns("What is 3 + 1?", "x")}
    write(tmp_path / "a.jsonl", [*GOOD[:90], json.dumps(openai).encode(), GOOD[5]])
    (tmp_path / "b.json").write_text(json.dumps([{"messages": tiny.turns("other", "y")}, sharegpt]))
    code, found = validate("a.jsonl", "b.json")
    assert code == 0, "a duplicate is a warning"
    duplicates = [finding for finding in found["findings"] if finding["code"] == "duplicate"]
    assert [finding["message"] for finding in duplicates] == [
        "the same conversation as a.jsonl:6",
        "the same conversation as a.jsonl:91",
    ]
    assert [(finding["file"], finding["line"]) for finding in duplicates] == [("a.jsonl", 92), ("b.json", 1)]
    assert found["summary"]["good"] == 94, "a build reads them, and counts them by themselves"


def test_errors_are_named_however_many_warnings_come_before(validate, tmp_path):
    question = [json.dumps({"messages": tiny.turns("q", f"a{i}", "and?")}).encode() for i in range(50)]
    write(tmp_path / "a.jsonl", [*question, NO_REPLY, *GOOD[:3]])
    code, found = validate("a.jsonl", max_errors=10)
    assert code == 1
    assert places(found, "no_assistant") == [("a.jsonl", 51)]
    assert len(places(found, "no_reply_at_end")) == 10
    assert found["summary"]["codes"]["no_reply_at_end"] == 50
    assert found["summary"]["hidden"] == 40


def test_an_info_is_shown_at_its_first_place_in_each_file(validate, tmp_path):
    lines = [json.dumps({**json.loads(line), "meta": 1}).encode() for line in GOOD[:100]]
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, lines)
    _, found = validate("a.jsonl", "b.jsonl", ignore=("duplicate",))
    assert places(found) == [("a.jsonl", 1), ("b.jsonl", 1)]
    assert found["findings"][0]["path"] == "$.meta"


def test_severities_decide_the_exit_code(validate, tmp_path):
    write(tmp_path / "a.jsonl", [*GOOD[:5], json.dumps({"messages": tiny.turns("q", "a", "and?")}).encode()])
    assert validate("a.jsonl")[0] == 0
    assert validate("a.jsonl", strict=True)[0] == 1
    code, found = validate("a.jsonl", error=("no_reply_at_end",))
    assert code == 1
    assert found["summary"]["good"] == 5
    code, found = validate("a.jsonl", strict=True, ignore=("no_reply_at_end",))
    assert code == 0
    assert found["findings"] == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"error": ("no_reply_at_ende",)}, "no_reply_at_end"),
        ({"ignore": ("invalid_json",)}, "stays an error"),
        ({"error": ("crlf",)}, "--strict"),
        ({"warn": ("duplicate",), "ignore": ("duplicate",)}, "another flag"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_a_severity_that_cannot_be_is_refused(validate, tmp_path, flags, said):
    write(tmp_path / "a.jsonl", GOOD[:2])
    with pytest.raises(SetupError) as refusal:
        validate("a.jsonl", **flags)
    assert said in f"{refusal.value.message} {refusal.value.remedy}"


def test_what_is_found_is_sent_while_a_large_unit_is_still_read(tmp_path, monkeypatch):
    """An archive is one unit, and may be 100 GB."""
    monkeypatch.setattr("dft_prep.validate.survey._PORTION_SECONDS", 0.0)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join([NO_REPLY, *GOOD * 10]) + b"\n"))
    (source,) = resolve_sources([str(path)])
    (unit,) = units.plan_units(source.files[0], "a")
    context = SurveyContext(
        severities=Severities(),
        known=frozenset(),
        most=5,
        encoding=None,
        max_length=None,
        contamination=make_ngrams([]),
    )
    portions = list(SurveyJob(context).start()(unit))
    assert len(portions) > 5
    assert [found.finding.code for found in portions[0].found] == ["no_assistant"]
    assert sum(portion.records for portion in portions) == 4001
    assert [portion.lines >= 0 for portion in portions] == [False] * (len(portions) - 1) + [True]


def test_a_unit_sends_no_more_than_can_be_shown():
    room = Room(3)
    finding = {"file": "a", "line": 1, "column": 1, "byte_offset": 0, "path": "$", "message": "m"}
    from dft_common.records import Finding

    warning = Finding(**finding, code="empty_reply", severity="warning")
    error = Finding(**finding, code="no_assistant", severity="error")
    assert [room.takes(each) for each in (warning, warning, error, warning, error, error, error)] == [
        True, True, True, False, True, True, False,
    ]  # fmt: skip


def test_units_that_finish_early_never_cost_the_front_its_findings(validate, tmp_path, monkeypatch):
    monkeypatch.setattr("dft_prep.validate.command._HELD_FINDINGS", 1)
    write(tmp_path / "a.jsonl", [NO_REPLY, *GOOD[:40]] * 6)
    _, found = validate("a.jsonl", max_errors=6, ignore=("duplicate",))
    assert places(found, "no_assistant") == [("a.jsonl", 1 + 41 * number) for number in range(6)]


def test_a_file_of_several_formats_is_read_record_by_record_and_says_so(validate, tmp_path):
    sharegpt = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    write(tmp_path / "a.jsonl", [*GOOD[:60], json.dumps(sharegpt).encode()])
    write(tmp_path / "b.jsonl", GOOD[60:70])
    _, found = validate("a.jsonl", "b.jsonl")
    assert places(found, "mixed_shapes") == [("a.jsonl", 1)]
    assert "openai 60, sharegpt 1" in found["findings"][0]["message"]
    assert found["summary"]["sources"][0]["formats"] == {"openai": 60, "sharegpt": 1}


def test_a_file_that_changes_while_it_is_read_is_found_at_its_first_line(validate, tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", GOOD)
    check, checks = readers.check_unchanged, []

    def change_behind_the_first_unit(file):
        checks.append(file)
        if len(checks) == 3:  # each unit checks at its beginning and its end
            write(tmp_path / "a.jsonl", GOOD[:-1])
        check(file)

    monkeypatch.setattr(readers, "check_unchanged", change_behind_the_first_unit)
    code, found = validate("a.jsonl", preprocessing_num_workers=1)
    assert code == 1
    assert set(places(found, "file_changed")) == {("a.jsonl", 1)}
