"""The tools that a record declares, and whether a call's arguments fit one: the part of JSON Schema that tools use.

Called by `tool_rules`. Schemas are data, and data is not trusted: no reference leaves the document, no pattern is run,
depth and work are bounded. What is not understood is not judged: a finding must be right.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from dft_prep.reconcile.converters import quoted, type_name

_DEPTH = 32
_STEPS = 10_000
_SHOWN = 5
_LONGEST_NAME = 64
_SCHEMA_KEYS = ("parameters", "input_schema", "inputSchema", "parametersJsonSchema")
_LIST_KEYS = ("function_declarations", "functionDeclarations")
# Where one of these stands, a property may be declared by other means than `properties`.
_MORE_PROPERTIES = frozenset(
    ["$ref", "allOf", "anyOf", "oneOf", "if", "patternProperties", "propertyNames", "dependentSchemas"]
).union(["unevaluatedProperties", "$dynamicRef", "extends"])


class DeclaredTools(msgspec.Struct, frozen=True, kw_only=True):
    schemas: dict[str, Any]
    """By name; None where a tool's parameters are not given, or given twice and differently."""
    complete: bool
    """Every tool was understood, so that a name that is not here is declared nowhere."""


class NotJSON(Exception):
    """Says what is wrong with a text that should be JSON."""


def decode_json(text: str) -> Any:
    """A value, by RFC 8259. Raises NotJSON; RecursionError where it is legal but too deep."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        pass  # the decoder refuses some legal JSON, and says less about the rest

    def refuse_constant(name: str) -> None:
        raise NotJSON(f"found {name}")

    try:
        return json.loads(text, parse_constant=refuse_constant, parse_int=_to_number)
    except json.JSONDecodeError as error:
        raise NotJSON(f"{error.msg} at character {error.pos + 1:,}") from None


def _to_number(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:  # legal, though longer than Python converts
        return float(digits)


def declared_tools(tools: Sequence[Any]) -> DeclaredTools:
    """What OpenAI's, Anthropic's and Google's forms declare, as objects or as JSON in a text."""
    schemas: dict[str, Any] = {}
    complete = True
    for name, schema in _each_tool(tools):
        if name is None:
            complete = False
        else:
            schemas[name] = schema if name not in schemas or schemas[name] == schema else None
    return DeclaredTools(schemas=schemas, complete=complete)


def _each_tool(tools: Sequence[Any]) -> Iterator[tuple[str | None, Any]]:
    """(name, parameters) of each tool; without a name where it was not understood."""
    for given in tools:
        tool = _as_object(given)
        function = _as_object(tool.get("function", tool)) if tool else None
        lists = [tool[key] for key in _LIST_KEYS if isinstance(tool.get(key), list)] if tool else []
        if lists:
            for inner in lists:
                yield from ((_name(_as_object(each)), _parameters(_as_object(each))) for each in inner)
        else:
            yield _name(function), _parameters(function)


def _name(function: dict[str, Any] | None) -> str | None:
    name = function.get("name") if function else None
    return name if isinstance(name, str) else None


def _parameters(function: dict[str, Any] | None) -> dict[str, Any] | None:
    return next((_as_object(function[key]) for key in _SCHEMA_KEYS if key in function), None) if function else None


def _as_object(value: Any) -> dict[str, Any] | None:
    """An object, also one that is written as JSON in a text."""
    if isinstance(value, str):
        try:
            value = decode_json(value)
        except (NotJSON, RecursionError):
            return None
    return value if isinstance(value, dict) else None


def find_misfit(arguments: dict[str, Any], schema: dict[str, Any]) -> str | None:
    """The first thing about a call's arguments that its tool's schema does not allow: `days[0]: got text, ...`."""
    return _Check(schema).value(arguments, schema, "", 0)


def near(name: str, known: Sequence[str]) -> str:
    """A remedy that names the nearest known name, or nothing."""
    if len(name) > _LONGEST_NAME:
        return ""
    close = difflib.get_close_matches(name, [each for each in known[:200] if len(each) <= _LONGEST_NAME], n=1)
    return f"did you mean {quoted(close[0])}?" if close else ""


class _Check:
    """One comparison of a value with a schema. Each method returns the first misfit, or None."""

    def __init__(self, root: dict[str, Any]) -> None:
        self.root = root
        self.steps = 0

    def value(self, value: Any, schema: Any, path: str, depth: int) -> str | None:
        self.steps += 1
        if depth > _DEPTH or self.steps > _STEPS or not isinstance(schema, dict):
            return None
        if "$ref" in schema:
            return self.value(value, self._referred(schema["$ref"]), path, depth + 1)
        if value is None and schema.get("nullable") is True:
            return None
        found = _type_misfit(value, schema.get("type")) or _choice_misfit(value, schema)
        if found:
            return f"{path}: {found}" if path else found
        return (
            self._combined(value, schema, path, depth)
            or (self._object(value, schema, path, depth) if isinstance(value, dict) else None)
            or (self._list(value, schema, path, depth) if isinstance(value, list) else None)
        )

    def _referred(self, reference: Any) -> Any:
        """What a reference within the document points to; None where it points elsewhere, or to nothing."""
        if not isinstance(reference, str) or not reference.startswith("#"):
            return None
        found: Any = self.root
        for step in reference[1:].split("/")[1:]:
            found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
        return found

    def _combined(self, value: Any, schema: dict[str, Any], path: str, depth: int) -> str | None:
        for key in ("anyOf", "oneOf"):
            choices = schema.get(key)
            if not isinstance(choices, list) or not choices:
                continue
            judge = self._open if "properties" in schema else self.value
            misfits = [judge(value, choice, path, depth + 1) for choice in choices[:_STEPS]]
            # Any one will do, for both: that no second one fits is beyond what a tool's author means.
            if all(misfits):
                return misfits[0] if len(misfits) == 1 else f"{path or 'the arguments'}: fits none of its forms"
        parts = schema.get("allOf")
        each = parts if isinstance(parts, list) else []
        return next(filter(None, (self._open(value, part, path, depth + 1) for part in each)), None)

    def _open(self, value: Any, part: Any, path: str, depth: int) -> str | None:
        """`value`, by a part that does not know the properties beside it."""
        if not isinstance(part, dict) or "$ref" in part:
            return None
        return self.value(value, {"allOf": [], **part}, path, depth)

    def _object(self, value: dict[str, Any], schema: dict[str, Any], path: str, depth: int) -> str | None:
        declared = schema.get("properties")
        properties = declared if isinstance(declared, dict) else {}
        required = schema.get("required")
        for name in required if isinstance(required, list) else ():
            if isinstance(name, str) and name not in value:
                return f"{_join(path, name)} is missing, which is required"
        closed = schema.get("additionalProperties") is False
        # A schema of nothing but `{"type": "object"}` inside another means any object.
        told = isinstance(declared, dict) and (properties or not depth) and "additionalProperties" not in schema
        for name, item in value.items():
            # As everywhere, a null is as an absent field, unless the schema wants one.
            if item is None and not (isinstance(required, list) and name in required):
                continue
            if name in properties:
                found = self.value(item, properties[name], _join(path, name), depth + 1)
            elif _MORE_PROPERTIES.isdisjoint(schema) and (closed or told):
                why = "not allowed" if closed else "not declared"
                hint = near(name, list(properties))
                found = f"{_join(path, name)} is {why}" + (f" ({hint})" if hint else "")
            else:
                found = self.value(item, schema.get("additionalProperties"), _join(path, name), depth + 1)
            if found:
                return found
        return None

    def _list(self, value: list[Any], schema: dict[str, Any], path: str, depth: int) -> str | None:
        if "prefixItems" in schema:
            return None
        each = (self.value(item, schema.get("items"), f"{path}[{at}]", depth + 1) for at, item in enumerate(value))
        return next(filter(None, each), None) if isinstance(schema.get("items"), dict) else None


def _is_integer(value: Any) -> bool:
    return _is_number(value) and (isinstance(value, int) or value.is_integer())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_TYPES: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "number": _is_number,
    "integer": _is_integer,
    "boolean": lambda value: isinstance(value, bool),
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "null": lambda value: value is None,
}


def _type_misfit(value: Any, written: Any) -> str | None:
    if isinstance(written, str) and written in _TYPES and _TYPES[written](value):
        return None
    wanted = [written] if isinstance(written, str) else written
    if not isinstance(wanted, list) or not all(isinstance(name, str) for name in wanted):
        return None
    names = [name.lower() for name in wanted]  # Google writes STRING
    # "str", "dict" or "float" are no types of JSON Schema; what their authors mean by them is not ours to tell.
    if not names or any(name not in _TYPES for name in names) or any(_TYPES[name](value) for name in names):
        return None
    shown = f"{type_name(value)}, {quoted(value)}" if isinstance(value, str | int | float) else type_name(value)
    return f"got {shown}, expected {' or '.join(names[:_SHOWN])}"


def _choice_misfit(value: Any, schema: dict[str, Any]) -> str | None:
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    # An enum beside a list is nearly always meant for its items.
    if not isinstance(choices, list) or not choices or isinstance(value, list | dict):
        return None
    if any(choice == value and isinstance(choice, bool) == isinstance(value, bool) for choice in choices):
        return None
    shown = ", ".join(map(quoted, choices[:_SHOWN])) + (", ..." if len(choices) > _SHOWN else "")
    return f"got {quoted(value)}, expected {'one of ' if len(choices) > 1 else ''}{shown}"


def _join(path: str, name: str) -> str:
    shown = name if name.isidentifier() and len(name) <= _LONGEST_NAME else quoted(name)
    return f"{path}.{shown}" if path else shown
