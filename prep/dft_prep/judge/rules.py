"""What is odd about a conversation that can be read: the rules of the scope `rule` in `codes.CODES`.

Called by `judgement` for every record, so an ordinary one may cost no more than a microsecond or two: one pass over its
messages rules most oddities out, a look at its bytes the control characters, and only what is left is examined by the
rules themselves. Calls and tools have rules of their own (`tool_rules`). A rule only finds; how grave that is, the
recipe says (`severities`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

import msgspec

from dft_common.records import Conversation, Message
from dft_prep.judge.oddities import Oddity
from dft_prep.judge.tool_rules import find_tool_oddities
from dft_prep.reconcile.converters import quoted

SHORTEST_REPEATED = 20
"""Characters. Shorter replies ("Yes.", "#### 72", a label of a classification) are rightly given more than once."""

_MOST = 20
"""Findings of one code in one record: a record of a million empty turns is one bad record."""


def find_oddities(conversation: Conversation, raw: bytes | None = None, escapes: bool | None = None) -> list[Oddity]:
    """Every oddity, in the order of the messages.

    raw: the record's bytes, where it has any, for quick searches. escapes: whether `find_escape` finds any in them,
    where that is known.
    """
    messages = conversation.messages
    found: list[Oddity] = []
    suspect = calls = control = False
    previous = question = ""
    lengths: set[int] = set()
    # This loop is quick rather than plain: it only suspects, and `_turn_oddities` has the rules.
    for message in messages:
        role = message.role
        content = message.content
        if content and ("\b" in content or "\f" in content):
            control = True
        if role == "assistant":
            if message.tool_calls:
                calls = True
            if message.reasoning and ("\b" in message.reasoning or "\f" in message.reasoning):
                control = True
            reply = content.strip() if content else ""
            length = len(reply)
            if (not reply and not message.tool_calls) or previous == role or reply == question or length in lengths:
                suspect = True
            elif length >= SHORTEST_REPEATED:
                lengths.add(length)
            question = ""
        elif role == "user":
            if previous == role:
                suspect = True
            question = content.strip() if content else ""
        elif role == "tool":
            calls = True
            question = ""
        elif previous and previous != "system":
            suspect = True
        previous = role
    if suspect or previous != "assistant":
        found += _turn_oddities(messages)
    if control or _may_hold_control(raw, messages, escapes):
        found += _control_characters(messages)
    if calls:
        found += find_tool_oddities(conversation)
    if len(found) > 1:
        found.sort(key=lambda odd: odd.message_index)
    return found if len(found) <= _MOST else list(_at_most(found))


def _at_most(found: Sequence[Oddity]) -> Iterator[Oddity]:
    """The first `_MOST` of each code; the last of them says how many more there are."""
    left = Counter(odd.code for odd in found)
    seen: Counter[str] = Counter()
    for odd in found:
        seen[odd.code] += 1
        left[odd.code] -= 1
        if seen[odd.code] == _MOST and left[odd.code]:
            yield odd._replace(found=f"{odd.found}; and {left[odd.code]:,} more in this record")
        elif seen[odd.code] <= _MOST:
            yield odd


# Turns


def _turn_oddities(messages: Sequence[Message]) -> Iterator[Oddity]:
    roles = [message.role for message in messages]
    yield from _role_oddities(roles)
    first: dict[str, int] = {}
    for number, message in enumerate(messages):
        if message.role != "assistant":
            continue
        reply = (message.content or "").strip()
        if not reply:
            # A turn that calls a tool says nothing, and one that only reasons trains its reasoning.
            if not message.tool_calls and message.reasoning is None:
                what = f"white space alone, {quoted(message.content)}" if message.content else "empty"
                yield Oddity("empty_reply", number, "content", f"the reply is {what}")
            continue
        if number and roles[number - 1] == "user" and reply == (messages[number - 1].content or "").strip():
            yield Oddity("reply_equals_question", number, "content", f"the reply is its question, {quoted(reply)}")
        # "Let me look that up." before different calls is no repetition.
        if len(reply) >= SHORTEST_REPEATED and not message.tool_calls:
            if reply in first:
                yield Oddity(
                    "repeated_reply", number, "content", f"as {number - first[reply]} turns before: {quoted(reply)}"
                )
            first.setdefault(reply, number)


def _role_oddities(roles: Sequence[str]) -> Iterator[Oddity]:
    in_front, run = True, 0
    for number, role in enumerate(roles):
        if role not in ("system", "developer"):
            in_front = False
        elif not in_front:
            yield Oddity("system_not_first", number, "role", f"a {role} turn stands after the {roles[number - 1]}'s")
        run = run + 1 if number and role == roles[number - 1] else 1
        ends = number + 1 == len(roles) or roles[number + 1] != role
        if run > 1 and ends and role in ("user", "assistant"):
            # One finding for a run of any length, at its second turn.
            yield Oddity(f"{role}s_in_a_row", number - run + 2, "role", f"{run} {role} turns in a row")
    if roles[-1] != "assistant":
        yield Oddity("no_reply_at_end", len(roles) - 1, "", f"ends with a {roles[-1]} turn")


# Control characters. JSON writes those below U+0020 as escapes; the others stand in UTF-8 or as escapes.

_UNWANTED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]")
_PAST_PLANE_1 = re.compile("[\U0001fffe-\U0010ffff]")
_DELETE, _BACKSLASH, _C2, _B7, _BF = 0x7F, 0x5C, 0xC2, 0xB7, 0xBF
# A byte is looked for 20 times as fast as a pattern, and a plain pattern several times as fast as any other.
find_escape = re.compile(rb"\\u").search
_CONTROL_ESCAPE = re.compile(rb"\\u00[0-9]").search
_C1_IN_UTF8 = re.compile(rb"\xc2[\x80-\x9f]").search
_FDD0_IN_UTF8 = re.compile(rb"\xef\xb7").search
_END_OF_PLANE_IN_UTF8 = re.compile(rb"\xbf[\xbe\xbf]").search
_encode = msgspec.json.Encoder().encode


def _may_hold_control(raw: bytes | None, messages: Sequence[Message], escapes: bool | None) -> bool:
    """Whether some text may hold a character of `_UNWANTED`, U+0008 and U+000C aside, or a noncharacter."""
    if raw is not None:
        if escapes is None:
            escapes = _BACKSLASH in raw and find_escape(raw) is not None
        if not escapes:
            return _stands_in_utf8(raw)
    # Escapes of any character: written anew, only those of control characters are left.
    written = _encode(messages)
    return _CONTROL_ESCAPE(written) is not None or _stands_in_utf8(written)


def _stands_in_utf8(raw: bytes) -> bool:
    if _DELETE in raw:
        return True
    return not raw.isascii() and bool(
        (_C2 in raw and _C1_IN_UTF8(raw))
        or (_B7 in raw and _FDD0_IN_UTF8(raw))
        or (_BF in raw and _END_OF_PLANE_IN_UTF8(raw))
    )


def _control_characters(messages: Sequence[Message]) -> Iterator[Oddity]:
    for number, message in enumerate(messages):
        for part, text in (("content", message.content), ("reasoning", message.reasoning)):
            if text and (places := _unwanted(text)):
                more = f", and {len(places) - 1:,} more" if len(places) > 1 else ""
                found = f"holds U+{ord(text[places[0]]):04X} at character {places[0] + 1:,}{more}"
                yield Oddity("control_characters", number, part, found)


def _unwanted(text: str) -> list[int]:
    """Where the control characters and noncharacters stand."""
    places = [match.start() for match in _UNWANTED.finditer(text)]
    far = (match.start() for match in _PAST_PLANE_1.finditer(text))
    return sorted(places + [place for place in far if ord(text[place]) & 0xFFFE == 0xFFFE])
