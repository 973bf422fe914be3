"""STUB by the lead: the engineer of the formats replaces this. FORMATS[name].fields, KNOWN_FIELDS are what fields.py and
plain.py use: KNOWN_FIELDS holds every top-level field name that any format reads or takes for evidence."""

import msgspec


class Format(msgspec.Struct, frozen=True):
    name: str
    fields: dict[str, str]


FORMATS = {
    "openai": Format("openai", {"messages[].role": "messages[].role", "messages[].content": "messages[].content", "tools": "tools"}),
}
KNOWN_FIELDS = frozenset(["messages", "conversations", "instruction", "input", "output", "response", "system", "tools", "functions", "history", "prompt", "completion", "chosen", "rejected", "query", "data", "text"])
