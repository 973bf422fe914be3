from __future__ import annotations

import json
import time
from typing import Any

import pytest

from dft_common.records import Conversation, Message, ToolCall
from dft_prep.codes.table import CODES
from dft_prep.judge.declared_tools import find_misfit
from dft_prep.judge.oddities import Oddity
from dft_prep.judge.rules import find_oddities

USER, REPLY = Message(role="user", content="q"), Message(role="assistant", content="a")


def call(*names: str, arguments: str = "{}", ids: tuple[str, ...] = (), content: str | None = None) -> Message:
    calls = (
        ToolCall(name=name, arguments=arguments, id=ids[at] if ids else None) for at, name in enumerate(names or ("f",))
    )
    return Message(role="assistant", content=content, tool_calls=tuple(calls))


def result(content: str = "1", id: str | None = None) -> Message:
    return Message(role="tool", content=content, tool_call_id=id)


def oddities(*messages: Message, tools: tuple[Any, ...] = ()) -> list[Oddity]:
    found = find_oddities(Conversation(messages=messages, tools=tools))
    assert all(CODES[odd.code].scope == "rule" for odd in found)
    return [odd for odd in found if odd.code != "no_reply_at_end"]


def places(found: list[Oddity]) -> list[tuple[str, int, str]]:
    return [(odd.code, odd.message_index, odd.part) for odd in found]


TWO_IDS = call("f", "g", ids=("1", "2"))
UNPAIRED = {
    "a user instead of the result": ([USER, call(), USER, REPLY], [("call_without_answer", 1, "tool_calls[0]")]),
    "a user, and another call": (
        [USER, call(), USER, call("g"), result(), REPLY],
        [("call_without_answer", 1, "tool_calls[0]")],
    ),
    "a second result, where the caller wrote code too": (
        [USER, call(content="```"), result(), result(), REPLY],
        [("answer_without_call", 3, "")],
    ),
    "a reply instead of the result": (
        [USER, call(), REPLY],
        [("call_without_answer", 1, "tool_calls[0]"), ("assistants_in_a_row", 2, "role")],
    ),
    "one result for two calls": (
        [USER, call("f", "g"), result(), REPLY],
        [("call_without_answer", 1, "tool_calls[1]")],
    ),
    "one result for two calls, by id": (
        [USER, TWO_IDS, result(id="2"), REPLY],
        [("call_without_answer", 1, "tool_calls[0]")],
    ),
    "one result at the end": ([USER, call("f", "g"), result()], [("call_without_answer", 1, "tool_calls[1]")]),
    "one result, and another call": (
        [USER, call("f", "g"), result(), call(), result(), REPLY],
        [("call_without_answer", 1, "tool_calls[1]")],
    ),
    "a result after a user": ([USER, result(), REPLY], [("answer_without_call", 1, "")]),
    "a result after a reply": ([USER, REPLY, result(), REPLY], [("answer_without_call", 2, "")]),
    "two results of one call": ([USER, call(), result(), result(), REPLY], [("answer_without_call", 3, "")]),
    "a result of another call": (
        [USER, call(ids=("1",)), result(id="9"), REPLY],
        [("call_id_mismatch", 2, "tool_call_id")],
    ),
    "a result twice": (
        [USER, TWO_IDS, result(id="1"), result(id="1"), REPLY],
        [("call_id_mismatch", 3, "tool_call_id")],
    ),
}
PAIRED = {
    "a result": [USER, call(), result(), REPLY],
    "a result for each call": [USER, call("f", "g"), result(), result(), REPLY],
    "results in another order": [USER, TWO_IDS, result(id="2"), result(id="1"), REPLY],
    "ids on one side alone": [USER, TWO_IDS, result(), result(), USER, call(), result(id="x"), REPLY],
    "calls one after another": [USER, call(), result(), call(), result(), REPLY],
    "calls at the end": [USER, call("f", "g")],
    "a call after a result at the end": [USER, call(), result(), call()],
    "the results of all as a list": [USER, call("f", "g"), result('[{"x": 1}, {"x": 2}]'), REPLY],
    "the results of all in one text": [
        *(USER, call("f", "g")),
        *(result("<tool_response>1</tool_response>\n<tool_response>2</tool_response>"), REPLY),
    ],
    "the result of a call written as text": [
        *(USER, Message(role="assistant", content='<tool_call>{"name": "f"}</tool_call>'), result(), REPLY),
    ],
    "the results of code": [USER, Message(role="assistant", content="```python\n1\n```"), result(), result(), REPLY],
    "a system turn before the result": [USER, call(), Message(role="system", content="s"), result(), REPLY],
}


@pytest.mark.parametrize("name", UNPAIRED)
def test_calls_and_results_that_do_not_pair(name):
    messages, expected = UNPAIRED[name]
    assert places(oddities(*messages)) == expected


@pytest.mark.parametrize("name", PAIRED)
def test_calls_and_results_that_pair(name):
    assert [odd for odd in oddities(*PAIRED[name]) if odd.code != "system_not_first"] == []


def test_parallel_calls_may_stand_in_turns_of_their_own():
    found = oddities(USER, call(), call("g"), result(), result(), REPLY)
    assert places(found) == [("assistants_in_a_row", 2, "role")]


def test_what_does_not_pair_is_named():
    (odd,) = oddities(USER, call("get\x1b_weather"), USER, REPLY)
    assert odd.found == r"no result follows the call of 'get\x1b_weather'"
    (odd,) = oddities(USER, TWO_IDS, result(id="9"), result(id="2"), REPLY)
    assert odd.found == "got '9', the call is '1', '2'"


# Arguments

NOT_JSON = {
    "python": ("{'a': 1}", "character 2"),
    "cut": ('{"a": ', "not JSON"),
    "NaN": ('{"a": NaN}', "NaN"),
    "a trailing comma": ('{"a": 1,}', "not JSON"),
    "two values": ("{} {}", "not JSON"),
    "a list": ("[1]", "a list, expected an object"),
    "text": ('"x"', "text, expected an object"),
    "null": ("null", "null, expected an object"),
    "nothing": ("", "empty"),
    "white space": (" ", "empty"),
}
ARE_JSON = {
    "nothing to say": "{}",
    "white space": ' {"a" : 1}\n',
    "a number beyond floats": '{"a": 1e400}',
    "5,000 digits": '{"a": ' + "1" * 5000 + "}",
    "half a surrogate pair": '{"a": "\\ud800"}',
    "20,000 levels": '{"a": ' + "[" * 20_000 + "]" * 20_000 + "}",
}


@pytest.mark.parametrize("name", NOT_JSON)
def test_arguments_that_are_no_json_object(name):
    arguments, words = NOT_JSON[name]
    (odd,) = oddities(USER, call("f", arguments=arguments), result(), REPLY)
    assert (odd.code, odd.message_index, odd.part) == ("arguments_not_json", 1, "tool_calls[0]")
    assert words in odd.found
    assert "'f'" in odd.found


@pytest.mark.parametrize("name", ARE_JSON)
def test_arguments_that_are(name):
    assert oddities(USER, call("f", arguments=ARE_JSON[name]), result(), REPLY) == []


WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["C", "F"]}},
    "required": ["city"],
}
FORMS = {
    "OpenAI": {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    "bare": {"name": "get_weather", "description": "x", "parameters": WEATHER},
    "Anthropic": {"name": "get_weather", "input_schema": WEATHER},
    "MCP": {"name": "get_weather", "inputSchema": WEATHER},
    "Google": {"function_declarations": [{"name": "get_weather", "parameters": WEATHER}]},
    "JSON text": json.dumps({"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}}),
    "parameters as JSON text": {"name": "get_weather", "parameters": json.dumps(WEATHER)},
}


def called(name: str, arguments: Any, *tools: Any) -> list[tuple[str, str, str]]:
    found = oddities(USER, call(name, arguments=json.dumps(arguments)), result(), REPLY, tools=tools)
    assert all((odd.message_index, odd.part) == (1, "tool_calls[0]") for odd in found)
    return [(odd.code, odd.found, odd.help) for odd in found]


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_a_declared_tool_is_understood(form):
    tool = FORMS[form]
    assert called("get_weather", {"city": "Paris", "unit": "C"}, tool) == []
    assert called("get_weather", {"unit": "C"}, tool) == [
        ("arguments_misfit", "arguments of 'get_weather': city is missing, which is required", "")
    ]
    assert called("get_wether", {}, tool) == [
        ("undeclared_tool", "calls 'get_wether', which is not declared", "did you mean 'get_weather'?")
    ]


def test_tools_that_are_not_understood_are_not_judged():
    for tool in ("get_weather(city: str)", {"type": "web_search"}, {"name": 1}, "[1]", "", "{"):
        assert called("get_news", {"x": 1}, tool, FORMS["bare"]) == []
    assert called("get_weather", {"x": 1}, {"name": "get_weather"}) == []
    assert called("get_weather", {"x": 1}, {"name": "get_weather", "parameters": {"x": {"type": "str"}}}) == []


def test_a_tool_that_is_declared_twice_is_judged_where_both_say_the_same():
    other = {"name": "get_weather", "parameters": {**WEATHER, "required": ["zip"]}}
    for tools in ((FORMS["bare"], other), (other, FORMS["bare"])):
        assert called("get_weather", {"unit": "C"}, *tools) == []
    assert len(called("get_weather", {"unit": "C"}, FORMS["bare"], FORMS["OpenAI"])) == 1


def test_a_record_without_tools_declares_nothing_to_compare_with():
    assert called("get_weather", {"x": 1}) == []


def of(schema: Any, **more: Any) -> dict[str, Any]:
    """The schema of an object whose `x` is of `schema`."""
    return {"type": "object", "properties": {"x": schema}, **more}


NODE = {"type": "object", "properties": {"n": {}, "x": {"$ref": "#/$defs/node"}}, "required": ["n"]}
TREE = {"$ref": "#/$defs/node", "$defs": {"node": NODE}}
MISFITS = {
    "a number for text": (of({"type": "string"}), {"x": 5}, "x: got a number, 5, expected string"),
    "text for a number": (of({"type": "integer"}), {"x": "5"}, "x: got text, '5', expected integer"),
    "a fraction for an integer": (of({"type": "integer"}), {"x": 5.5}, "x: got a number, 5.5, expected integer"),
    "a boolean for a number": (of({"type": "number"}), {"x": True}, "x: got a boolean, True, expected number"),
    "a number for a boolean": (of({"type": "boolean"}), {"x": 1}, "x: got a number, 1, expected boolean"),
    "an object for a list": (of({"type": "array"}), {"x": {}}, "x: got an object, expected array"),
    "one of several types": (
        of({"type": ["string", "null"]}),
        {"x": []},
        "x: got a list, expected string or null",
    ),
    "Google's spelling": (of({"type": "STRING"}), {"x": 5}, "x: got a number, 5, expected string"),
    "not in the enum": (of({"enum": ["a", "b"]}), {"x": "c"}, "x: got 'c', expected one of 'a', 'b'"),
    "true is not 1": (of({"enum": [1]}), {"x": True}, "x: got True, expected 1"),
    "not the constant": (of({"const": "a"}), {"x": "c"}, "x: got 'c', expected 'a'"),
    "a null where one is required": (
        of({"type": "string"}, required=["x"]),
        {"x": None},
        "x: got null, expected string",
    ),
    "in a list": (of({"type": "array", "items": {"type": "number"}}), {"x": [1, "2"]}, "x[1]: got text, "),
    "in an object": (of(of({"type": "number"})), {"x": {"x": "2"}}, "x.x: got text, "),
    "missing in an object": (of(of({}, required=["y"])), {"x": {}}, "x.y is missing, which is required"),
    "not declared": (of({}), {"y": 1}, "y is not declared"),
    "nearly declared": ({"properties": {"city": {}}}, {"ctiy": 1}, "ctiy is not declared (did you mean 'city'?)"),
    "a tool without parameters": ({"type": "object", "properties": {}}, {"y": 1}, "y is not declared"),
    "not allowed": (of({}, additionalProperties=False), {"y": 1}, "y is not allowed"),
    "a further property of the wrong type": (
        of({}, additionalProperties={"type": "string"}),
        {"y": 1},
        "y: got a number, ",
    ),
    "no form fits": (of({"anyOf": [{"type": "string"}, {"type": "null"}]}), {"x": 1}, "x: fits none of its forms"),
    "a part of allOf": (of({"allOf": [{"type": "string"}]}), {"x": 1}, "x: got a number, "),
    "a reference": (TREE, {"n": 1, "x": {"n": 1, "x": {}}}, "x.x.n is missing"),
    "a name of escapes": (of({}), {"\x1b[2J": 1}, r"'\x1b[2J' is not declared"),
}
FITS = {
    "every type": (
        {"properties": {key: {"type": key} for key in ("string", "number", "integer", "boolean", "object", "array")}},
        {"string": "", "number": 1.5, "integer": 3.0, "boolean": False, "object": {}, "array": []},
    ),
    "an optional null": (of({"type": "string"}), {"x": None}),
    "a null of every column": (of({"type": "string"}), {"x": "a", "y": None}),
    "nullable": (of({"type": "string", "nullable": True}, required=["x"]), {"x": None}),
    "a type that JSON Schema does not have": (of({"type": "float"}), {"x": "1"}),
    "a type that is no name": (of({"type": {"type": "string"}}), {"x": 1}),
    "further properties allowed": (of({}, additionalProperties=True), {"y": 1}),
    "properties by pattern": (of({}, patternProperties={"^y": {}}), {"y": 1}),
    "properties in another part": (of({}, allOf=[{"properties": {"y": {"type": "number"}}}]), {"x": 1, "y": 1}),
    "properties beside forms": (
        of({}, anyOf=[{"properties": {"y": {"type": "number"}}}, {"required": ["z"]}]),
        {"x": 1, "y": 1},
    ),
    "any object inside": (of({"type": "object", "properties": {}}), {"x": {"y": 1}}),
    "an enum meant for the items": (of({"type": "array", "enum": ["a"]}), {"x": ["a"]}),
    "one of several forms": (of({"oneOf": [{"type": "string"}, {"type": "number"}]}), {"x": 1}),
    "a tuple": (of({"type": "array", "prefixItems": [{"type": "string"}], "items": {"type": "null"}}), {"x": ["a"]}),
    "a required that is a boolean": (of({"required": True}), {}),
    "no schema at all": ({}, {"x": 1}),
    "a reference elsewhere": (of({"$ref": "https://example.org/schema.json"}), {"x": 1}),
    "a reference to a file": (of({"$ref": "file:///etc/hostname"}), {"x": 1}),
    "a reference to nothing": (of({"$ref": "#/$defs/none/0"}), {"x": 1}),
    "a pattern is not run": (of({"type": "string", "pattern": "^(a+)+$"}), {"x": "a" * 40 + "!"}),
}


@pytest.mark.parametrize("name", MISFITS)
def test_arguments_that_do_not_fit_are_told_where_and_why(name):
    schema, arguments, expected = MISFITS[name]
    found = find_misfit(arguments, schema)
    assert found is not None
    assert found.startswith(expected)


@pytest.mark.parametrize("name", FITS)
def test_arguments_that_fit_or_cannot_be_judged(name):
    schema, arguments = FITS[name]
    assert find_misfit(arguments, schema) is None


def _endless(**keys: Any) -> dict[str, Any]:
    return {"$defs": {"a": {**keys}}, "$ref": "#/$defs/a"}


HOSTILE = {
    "a reference to itself": (_endless(**{"$ref": "#/$defs/a"}), {"x": 1}),
    "a reference to the root": (of({"$ref": "#"}), {"x": {"x": {"x": 1}}}),
    "forms of forms": (_endless(anyOf=[{"$ref": "#/$defs/a"}] * 50), {"x": 1}),
    "parts of parts": (_endless(allOf=[{"anyOf": [{"$ref": "#/$defs/a"}] * 50}] * 50), {"x": 1}),
    "a long list": (of({"type": "array", "items": {"type": "string"}}), {"x": ["a"] * 100_000}),
    "a long name": ({"properties": {"ab" * 20_000: {}}}, {"ab" * 19_999: 1}),
    "many names": ({"properties": {f"name_{i}": {} for i in range(100_000)}}, {"name_": 1}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_schema_takes_long_or_says_much(name):
    schema, arguments = HOSTILE[name]
    start = time.perf_counter()
    found = find_misfit(arguments, schema)
    assert time.perf_counter() - start < 1
    assert found is None or len(found) < 300


def test_a_hundred_thousand_calls_are_not_paired_for_long():
    ids = tuple(str(number) for number in range(100_000))
    results = [result(id=number) for number in reversed(ids)]
    start = time.perf_counter()
    assert oddities(USER, call(*["f"] * len(ids), ids=ids), *results, REPLY) == []
    assert time.perf_counter() - start < 2
