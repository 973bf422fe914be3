"""Every format of findings: whole, escaped, and a baseline for the next validation."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ET
from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dft_common import logs
from dft_common.errors import SetupError, report_error
from dft_common.records import Finding
from dft_prep.validate.baseline import finding_fingerprint, read_baseline
from dft_prep.validate.sarif import file_uri
from dft_prep.validate.summary import Summary, summary_text
from dft_prep.validate.writers import make_writer

KEYS = ["file", "line", "column", "byte_offset", "code", "severity", "path", "message", "help"]
FORMATS = ["text", "json", "jsonl", "github", "sarif", "junit"]
COMMAND = re.compile(r"##(vso)?\[|^\s*::(?!(error|warning|notice) file=)", re.MULTILINE)
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

HOSTILE_TEXT = st.text(
    alphabet="a:,%]>&\"'<\\/\n\r\t\x00\x1b\x7f\x85\u2028\u202e\ud800\uffff😀 ::error", max_size=12
) | st.sampled_from(
    [
        "]]>",
        "%0A::error::x",
        "::add-mask::x",
        "\n ::stop-commands::x",
        "##[add-mask]x",
        "###vso[task.x]y",
        "\x1b[2J",
        "</failure>",
        "a b/c#d?e",
        "--flag",
        "ftp://h/x y",
    ]
)
FINDINGS = st.builds(
    Finding,
    file=HOSTILE_TEXT.filter(bool).map(lambda text: text.encode("utf-8", "backslashreplace").decode()),
    line=st.integers(1, 10**9),
    column=st.integers(1, 10**6),
    byte_offset=st.integers(-1, 10**12),
    code=st.sampled_from(["no_assistant", "empty_reply", "bom"]),
    severity=st.sampled_from(["error", "warning", "info"]),
    path=HOSTILE_TEXT,
    message=HOSTILE_TEXT,
    help=HOSTILE_TEXT,
)


def written(
    format: str, findings: list[Finding], files: tuple[str, ...] = (), failing: tuple[str, ...] = ("error",)
) -> str:
    out = io.StringIO()
    writer = make_writer(format, out, failing)
    summary = Summary(files=list(files))
    for finding in findings:
        summary.count(finding.code, finding.severity, 1)
        writer.add(finding, finding_fingerprint(finding, b"x"))
    writer.close(summary)
    return out.getvalue()


def example(**changed) -> Finding:
    values = {"file": "a.jsonl", "line": 2, "column": 3, "byte_offset": 9, "code": "unknown_role", "severity": "error"}
    values |= {"path": "$.messages[0].role", "message": "got 'usr'", "help": "rename it"}
    return Finding(**{**values, **changed})


@settings(max_examples=100)
@given(st.lists(FINDINGS, max_size=4))
@pytest.mark.parametrize("format", FORMATS)
def test_nothing_in_the_data_steers_a_terminal_or_breaks_a_format(format, findings):
    text = written(format, findings)
    text.encode()  # no half surrogate pair is left
    assert not STEERING.search(text)
    assert format == "github" or not COMMAND.search(text), "a CI runner reads the log that this stands in"
    if format == "text":
        assert len(text.splitlines()) == len(findings) + sum(bool(finding.help) for finding in findings)
    if format == "github":
        lines = text.split("\n")[:-1]
        assert len(lines) == len(findings)
        assert all(
            re.match(r"::(error|warning|notice) file=[^:,]+,line=\d+,col=\d+,title=\w+::", line) for line in lines
        )
    if format == "json":
        assert [list(each) for each in json.loads(text)["findings"]] == [KEYS] * len(findings)
    if format == "jsonl":
        assert [list(json.loads(line)) for line in text.split("\n")[:-1]] == [[*KEYS, "fingerprint"]] * len(findings)
    if format == "sarif":
        assert len(json.loads(text)["runs"][0]["results"]) == len(findings)
    if format == "junit":
        assert len(list(ET.fromstring(text).iter("testcase"))) == len(findings)


def test_text_is_a_place_that_editors_follow_and_a_remedy():
    assert written("text", [example()]) == ("a.jsonl:2:3: unknown_role $.messages[0].role: got 'usr'\n    rename it\n")
    assert written("text", [example(file="a\nb.jsonl")]).startswith("a\\nb.jsonl:2:3: ")


def test_a_github_annotation_escapes_what_its_syntax_needs():
    text = written("github", [example(file="a\nb,c:d.jsonl", message="100%\r\nx")])
    assert "file=a%0Ab%2Cc%3Ad.jsonl,line=2,col=3" in text
    assert "100%25%0D%0Ax" in text


def test_sarif_has_a_rule_a_place_and_a_fingerprint_for_each_result():
    log = json.loads(written("sarif", [example(), example(byte_offset=-1, severity="info", code="bom")]))
    (run,) = log["runs"]
    rules = run["tool"]["driver"]["rules"]
    first, second = run["results"]
    assert log["version"] == "2.1.0"
    assert [rules[result["ruleIndex"]]["id"] for result in run["results"]] == ["unknown_role", "bom"]
    assert all(rule["shortDescription"]["text"] and rule["help"]["text"] for rule in rules)
    assert (first["level"], second["level"]) == ("error", "note")
    region = first["locations"][0]["physicalLocation"]["region"]
    assert region == {"startLine": 2, "startColumn": 3, "byteOffset": 9}
    assert "byteOffset" not in second["locations"][0]["physicalLocation"]["region"]
    assert first["partialFingerprints"] != second["partialFingerprints"]


def test_a_sarif_message_holds_no_placeholder_and_no_link_of_the_data():
    log = json.loads(written("sarif", [example(message="got '{0} [click](http://h)'", path="$.m[0].role")]))
    (result,) = log["runs"][0]["results"]
    assert result["message"]["text"] == "$.m[0].role: got '{{0}} [click]\\x28http://h)'. rename it"


@pytest.mark.parametrize(
    "path",
    [
        "data/a b.jsonl",
        "/root/x#y.jsonl",
        "c:d.jsonl",
        "a\\b.jsonl",
        "é?.jsonl",
        "s3://bucket/a b.jsonl",
        "http://h:80/100%@c:d.jsonl",
        "://x.jsonl",
    ],
)
def test_a_path_in_sarif_is_a_uri_that_means_it(path):
    uri = file_uri(path)
    parts = urlsplit(uri)
    assert re.fullmatch(r"[\x21-\x7e]+", uri)
    assert not parts.query and not parts.fragment
    if "://" in path:
        assert unquote(uri) == path
    else:
        assert parts.scheme == ("file" if path.startswith("/") else "")
        assert unquote(parts.path) == path


def test_junit_counts_what_fails_and_names_files_without_findings():
    found = [example(), example(line=9, severity="warning")]
    root = ET.fromstring(written("junit", found, ("a.jsonl", "b.jsonl")))
    assert (root.get("tests"), root.get("failures")) == ("3", "1")
    assert {suite.get("name"): suite.get("failures") for suite in root} == {"a.jsonl": "1", "b.jsonl": "0"}
    strict = ET.fromstring(written("junit", found, ("a.jsonl",), failing=("error", "warning")))
    assert strict.get("failures") == "2"


def test_junit_cases_have_names_of_their_own():
    root = ET.fromstring(written("junit", [example(path="$.meta"), example(path="$.id"), example(line=3)]))
    assert len({case.get("name") for case in root.iter("testcase")}) == 3


@pytest.mark.parametrize("format", ["json", "jsonl", "sarif"])
def test_an_output_is_a_baseline(tmp_path, format):
    findings = [example(), example(line=7, path="$.x"), example(file="b.jsonl", message="\ud800")]
    path = tmp_path / "known"
    path.write_text(written(format, findings), "utf-8")
    assert read_baseline(str(path)) == {finding_fingerprint(finding, b"x") for finding in findings}
    path.write_text(written(format, []), "utf-8")
    assert read_baseline(str(path)) == frozenset()


def test_a_fingerprint_is_of_the_record_not_of_its_line():
    one = example()
    assert finding_fingerprint(one, b"x") == finding_fingerprint(example(line=90, column=1, byte_offset=7), b"x")
    others = [example(file="b.jsonl"), example(code="bad_weight"), example(path="$.messages[1].role")]
    assert len({finding_fingerprint(other, b"x") for other in [one, *others]} | {finding_fingerprint(one, b"y")}) == 5


@pytest.mark.parametrize(
    "content", ["{}", "[1]", "no JSON", '{"findings": []}', '{"runs": [{"results": [{}]}]}', "\ufeff1"]
)
def test_what_is_no_output_of_ours_is_refused_as_a_baseline(tmp_path, content):
    path = tmp_path / "known"
    path.write_text(content, "utf-8")
    with pytest.raises(SetupError) as refusal:
        read_baseline(str(path))
    assert "--format json" in refusal.value.remedy


def test_a_baseline_that_is_not_there_is_a_usage_error(tmp_path):
    with pytest.raises(SetupError, match="No such file"):
        read_baseline(str(tmp_path / "nowhere.json"))


def test_a_baseline_that_lacks_findings_says_so(tmp_path, caplog):
    path = tmp_path / "known.json"
    path.write_text('{"findings": [], "summary": {"fingerprints": ["0"], "hidden": 1234}}')
    assert read_baseline(str(path)) == {"0"}
    assert "1,234 findings are not in it" in caplog.text
    assert "--max_errors" in caplog.text


def test_errors_and_warnings_that_name_a_file_command_no_ci_runner(monkeypatch, capsys):
    logger = logs.get_logger()
    for name, value in (("handlers", []), ("propagate", True), ("level", logger.level)):
        monkeypatch.setattr(logger, name, value)  # for setup's changes to end with this test
    logs.setup()
    report_error(SetupError("--data_files a\n::add-mask::x", remedy="b\n  ::stop-commands::y"))
    logger.warning("%s", "a\n##[add-mask]x")
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 6
    assert not COMMAND.search(text)


def test_the_summary_says_what_was_counted():
    text = summary_text(Summary(records=3, good=2, codes={"no_assistant": 1}, hidden=4, known=5))
    assert "\\x23#[add-mask]x" in summary_text(Summary(codes={"##[add-mask]x": 1}))
    for part in ("3 records, 2 good", "1 x no_assistant", "4 more findings are not shown", "5 known findings"):
        assert part in text
