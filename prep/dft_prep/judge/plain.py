"""The quick way for plain records: messages of `role` and `content`, or of `from` and `value` as ShareGPT has them, and
fields that are not used.

Called by `validate.Judge`. A record that the ordinary way found plain teaches the names of its unused fields; records
with the same names are then decoded straight into a `Conversation`. The outcome is that of the ordinary way, always:
whatever differs in the least (another key, a null, a tool call) is not taken here.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import msgspec

from dft_common.records import Conversation, Message
from dft_prep.judge.illegal import is_too_deep
from dft_prep.judge.repeats import quotes_of
from dft_prep.judge.rules import find_escape
from dft_prep.reconcile.converters import CALL_ROLES, SHAREGPT_ROLES
from dft_prep.reconcile.fields import Signature
from dft_prep.reconcile.formats import KNOWN_FIELDS

_GIVE_UP_AFTER = 100
_MOST_NAMES = 30
_QUOTES_OF_MESSAGE = 8
# Names that JSON writes as they are; msgspec takes no others for a field.
_SIMPLE = re.compile(r"[ !#-\[\]-~]+")


class _Kind(NamedTuple):
    """What plain records of a format look like."""

    key: str
    role_key: str
    content_key: str
    item: type
    """What a message is decoded into."""
    roles: dict[str, Any] | None
    """A message's role by its name in the data; None where the item is the message itself."""

    def place(self, message_index: int, part: str) -> str:
        """The JSON path of a part of a message (or, with -1, of the whole)."""
        path = "$" if message_index < 0 else f"$.{self.key}[{message_index}]"
        part = {"content": self.content_key, "role": self.role_key}.get(part, part)
        return f"{path}.{part}" if part else path


_Turn = msgspec.defstruct(
    "_Turn",
    [("role", str, msgspec.field(name="from")), ("content", str, msgspec.field(name="value"))],
    forbid_unknown_fields=True,
)
_KINDS = {
    "openai": _Kind("messages", "role", "content", Message, None),
    "sharegpt": _Kind(
        "conversations",
        "from",
        "value",
        _Turn,
        {name: role for name, role in SHAREGPT_ROLES.items() if name not in CALL_ROLES},
    ),
}


class PlainReader:
    """Reads plain records whose unused fields are those that it learnt. One a work unit."""

    def __init__(self) -> None:
        self._decode: Any = None
        self._decoders: dict[tuple[str, tuple[str, ...]], Any] = {}
        self._names: tuple[str, ...] = ()
        self._format, self.kind = "openai", _KINDS["openai"]
        self._quotes = 0
        self._misses = self._hits = 0
        self.escapes = False
        """Whether the record that was read last has escapes of characters by their number."""
        self.new: Signature | None = None
        """Of the record that was read last, where none before it had these fields and types."""
        self._counts: dict[tuple[type, ...], list[Any]] = {}
        """By the types of the unused fields: [signature, how often it was read]. Of the names that were learnt last."""
        self._earlier: list[list[Any]] = []

    def read(self, data: bytes) -> Conversation | None:
        """The conversation, or None where the record is not of the learnt kind."""
        if self._decode is None:
            return None
        try:
            record = self._decode(data)
            quotes, types = self._quotes, ()
            if self._names:
                if is_too_deep(data):
                    return self._missed()
                unused = msgspec.structs.astuple(record)[1:]
                quotes += sum(map(quotes_of, unused))
                types = tuple(map(type, unused))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return self._missed()
        messages = record.messages
        contents = [message.content for message in messages]
        if None in contents or not messages:
            return self._missed()
        if (roles := self.kind.roles) is not None:
            try:
                messages = tuple([Message(role=roles[turn.role], content=turn.content) for turn in messages])
            except KeyError:
                return self._missed()
        if messages[-1].role != "assistant" and all(message.role != "assistant" for message in messages):
            return self._missed()
        # Whatever else a message has, and a key that stands twice, shows in the number of quotation marks.
        inner = data.count(b'"') - quotes - _QUOTES_OF_MESSAGE * len(messages)
        if inner and inner != "".join(contents).count('"'):
            return self._missed()
        # A mark that is written as \\u0022 is missing in the text, and could hide one that a repeated key adds.
        self.escapes = b"\\" in data and find_escape(data) is not None
        if (inner or types) and self.escapes and b"u0022" in data:
            return self._missed()
        self._hits += 1
        self._count(types)
        return Conversation(messages=messages)

    def _missed(self) -> None:
        self._misses += 1
        self._decode = None

    def _count(self, types: tuple[type, ...]) -> None:
        self.new = None
        count = self._counts.get(types)
        if count is None:
            key, role_key, content_key = self.kind[:3]
            of_messages = ((f"{key}[].{role_key}", str), (f"{key}[].{content_key}", str))
            self.new = (self._format, ((key, list), *zip(self._names, types, strict=True), *of_messages))
            count = self._counts[types] = [self.new, 0]
        count[1] += 1

    def take_counts(self) -> list[tuple[Signature, int]]:
        """How often each signature was read since this was asked last."""
        counts = [(signature, times) for signature, times in [*self._earlier, *self._counts.values()]]
        self._earlier, self._counts = [], {}
        return counts

    def learn(self, record: dict[str, Any], form: str) -> None:
        """Take `record`, which the ordinary way found good and of the format `form`, as the kind that will come."""
        kind = _KINDS.get(form)
        if kind is None or kind.key not in record or self._misses > _GIVE_UP_AFTER + self._hits // 4:
            return
        names = tuple(sorted(key for key in record if key != kind.key))
        if len(names) > _MOST_NAMES or any(name in KNOWN_FIELDS or not _SIMPLE.fullmatch(name) for name in names):
            return
        plain = {kind.role_key, kind.content_key}
        if not all(isinstance(item, dict) and item.keys() == plain for item in record[kind.key]):
            return
        if (form, names) != (self._format, self._names):
            self._earlier += self._counts.values()
            self._format, self.kind, self._names, self._counts = form, kind, names, {}
        self._quotes = quotes_of(kind.key) + sum(map(quotes_of, names))
        known = self._decoders.get((form, names))
        self._decode = known or self._decoders.setdefault((form, names), _decoder(kind, names))


def _decoder(kind: _Kind, names: tuple[str, ...]) -> Any:
    fields = [
        ("messages", tuple[kind.item, ...], msgspec.field(name=kind.key)),
        *((f"unused_{number}", Any, msgspec.field(name=name)) for number, name in enumerate(names)),
    ]
    return msgspec.json.Decoder(msgspec.defstruct("PlainRecord", fields, forbid_unknown_fields=True)).decode
