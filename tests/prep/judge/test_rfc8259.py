"""RFC 8259, clause by clause: each text as a line of its own, and as a value inside of an otherwise good record."""

from __future__ import annotations

import pytest

from dft_common.records import Finding
from dft_prep.judge.judgement import Judge, Judged
from dft_prep.sources.named import resolve_sources
from dft_prep.sources.readers import UnitReader
from dft_prep.sources.units import plan_units

# Clause -> texts that are JSON values by it.
LEGAL = {
    "2 structure": [b"{}", b"[]", b'{"a":{"b":[{}]}}', b"[[[]]]", b'[1,"a",null]'],
    "2 white space": [b" [ ] ", b"\t{\t}\t", b"[ 1\r,\t2 ]", b'{ "a" : 1 }'],
    "3 values": [b"true", b"false", b"null", b'""', b"0", b" null "],
    "4 objects": [b'{"":0}', b'{"a":1,"b":2}', b'{"a\\u0000b":1}', '{"é 你":1}'.encode(), b'{"a":{"a":1}}'],
    "5 arrays": [b"[1]", b"[[],{}]", b"[null,null]", b"[" + b"1," * 500 + b"1]"],
    "6 numbers": [
        *(
            b"0",
            b"-0",
            b"1",
            b"-1",
            b"10",
            b"0.5",
            b"-0.5",
            b"1e5",
            b"1E5",
            b"1e+5",
            b"1e-5",
            b"1.5e300",
            b"0e1",
            b"0.0e0",
        ),
        *(b"123456789012345678901234567890", b"-1e-400", b"0." + b"1" * 400, b"1" * 5000),
    ],
    "7 strings": [
        *(
            b'"a"',
            b'"\\""',
            b'"\\\\"',
            b'"\\/"',
            b'"\\b\\f\\n\\r\\t"',
            b'"\\u0041"',
            b'"\\u00e9\\u00E9"',
            b'"\\ud83d\\ude00"',
        ),
        *(
            '"\u2028\u2029\x7f\x80"'.encode(),
            '"😀𝒳\U0010ffff"'.encode(),
            b'"\\u0000"',
            b'"\\uFFFF"',
            '"\ufeff"'.encode(),
        ),
        b'"{[,:]}"',
    ],
    "9 nesting": [b"[" * 200 + b"]" * 200, b'{"a":' * 200 + b"1" + b"}" * 200],
}
# Clause -> texts that are not.
ILLEGAL = {
    "2 structure": [b"{", b"}", b"[", b"]", b"[}", b"{]", b"[1", b'{"a":1', b"[1]]", b"{}}", b"[],", b",", b":", b""],
    "2 white space": [b"\x0b1", b"1\x0c", b"\xc2\xa01", b"\xe2\x80\x8b1", b"\xef\xbb\xbf1", b"[\xe3\x80\x80]"],
    "3 values": [b"True", b"NULL", b"nul", b"truee", b"undefined", b"None", b"'a'", b"a", b"tru", b"-true", b"\\u0031"],
    "4 objects": [
        *(b"{a:1}", b"{'a':1}", b"{1:1}", b'{"a"}', b'{"a":}', b'{"a":1,}', b'{,"a":1}', b'{"a":1 "b":2}', b'{"a"::1}'),
        *(b'{"a":1,,"b":2}', b"{null:1}", b'{"a" 1}', b'{"a":1;"b":2}', b'{"a",1}', b"{[]:1}"),
    ],
    "5 arrays": [b"[,]", b"[1,]", b"[,1]", b"[1,,2]", b"[1 2]", b"[1;2]", b"[1:2]", b"[1,\n", b"[...]"],
    "6 numbers": [
        *(
            b"+1",
            b"01",
            b"-01",
            b"00",
            b"1.",
            b".5",
            b"-.5",
            b"1.e5",
            b"1e",
            b"1e+",
            b"1e5.5",
            b"0x10",
            b"1_000",
            b"1,000",
        ),
        *(
            b"-",
            b"--1",
            b"1-",
            b"0b1",
            b"1f",
            b"NaN",
            b"-NaN",
            b"Infinity",
            b"-Infinity",
            b"inf",
            b"1e5e5",
            "１".encode(),
        ),
        *("٣".encode(), b"1 000", b"0o7", b"1e 5"),
    ],
    "7 strings": [
        *(b'"a', b'a"', b'"\n"', b'"\t"', b'"\x00"', b'"\x1f"', b'"\\x41"', b'"\\a"', b'"\\', b'"\\u12"', b'"\\u12g4"'),
        *(b'"\\U00e9"', b'"\\u"', b'""a"', b'"a" "b"', b'"\\\n"', b"\"a'", b'"\\0"', b'"\\\'"'),
    ],
    "8 encoding": [
        *(
            b'"\xff"',
            b'"\xc0\x80"',
            b'"\xed\xa0\x80"',
            b'"\xf4\x90\x80\x80"',
            b'"\xe9"',
            b'"\x80"',
            b'"\xe2\x82"',
            b"\xfe\xff",
        ),
        *(b'"\xf8\x88\x80\x80\x80"', b'"\xc3"', b'"\xc3("'),
    ],
    "no comments": [b"1//x", b"/*x*/1", b"[1/*x*/]", b"1#x", b"{}//", b"[//]"],
}

HEAD = b'{"messages": [{"role": "user", "content": "q%d"}, {"role": "assistant", "content": "a"}]'
GOOD = [HEAD % number + b"}" for number in range(4)]


def cases(table: dict[str, list[bytes]]):
    return [
        pytest.param(text, id=f"{clause}-{number}")
        for clause, texts in table.items()
        for number, text in enumerate(texts)
    ]


def questions_and_findings(path) -> tuple[list[str | None], list[Finding]]:
    (source,) = resolve_sources([str(path)])
    found = [each for unit in plan_units(source.files[0], "a") for each in map(Judge(path.name), UnitReader(unit))]
    questions = [each.conversation.messages[0].content for each in found if isinstance(each, Judged)]
    return questions, [each for each in found if isinstance(each, Finding)]


def written(tmp_path, record: bytes, form: str):
    records = [*GOOD[:2], record, *GOOD[2:]]
    path = tmp_path / f"a.{form}"
    path.write_bytes(b"\n".join(records) + b"\n" if form == "jsonl" else b"[\n" + b",\n".join(records) + b"\n]\n")
    return path


@pytest.mark.parametrize("text", cases(LEGAL))
def test_a_legal_value_is_no_error_wherever_it_stands(tmp_path, text):
    for form in ("jsonl", "json"):
        questions, bad = questions_and_findings(written(tmp_path, HEAD % 9 + b', "meta": ' + text + b"}", form))
        assert questions == ["q0", "q1", "q9", "q2", "q3"]
        assert bad == []
    questions, bad = questions_and_findings(written(tmp_path, text, "jsonl"))
    assert questions == ["q0", "q1", "q2", "q3"]
    assert [finding.code for finding in bad] in (["not_an_object"], ["unknown_shape"]), "legal, though no conversation"


@pytest.mark.parametrize("text", cases(ILLEGAL))
def test_an_illegal_text_is_refused_at_its_line_and_its_neighbours_untouched(tmp_path, text):
    value = HEAD % 9 + b', "meta": ' + text + b"}"
    for record in (text, value):
        if not record.strip():
            continue  # a blank line is no record
        questions, bad = questions_and_findings(written(tmp_path, record, "jsonl"))
        assert questions == ["q0", "q1", "q2", "q3"]
        assert 1 <= len(bad) <= 1 + record.count(b"\n")
        assert all(3 <= finding.line <= 3 + record.count(b"\n") for finding in bad)
        assert all(finding.code not in ("not_an_object", "unknown_shape") for finding in bad)
    questions, bad = questions_and_findings(written(tmp_path, value, "json"))
    assert bad
    if sum(map(text.count, (b"{", b"["))) > sum(map(text.count, (b"}", b"]"))):
        # A bracket that nothing closes may take the rest of an array with it, as one bad record.
        assert questions[:2] == ["q0", "q1"]
    else:
        assert bad[0].line == 4
        assert questions == ["q0", "q1", "q2", "q3"]
