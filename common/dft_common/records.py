"""The canonical conversation and what is said about a bad record.

`dft_prep.reconcile.record` turns every shape found in the wild into these records; everything after it
knows no other. They hold the author's characters unchanged: no field is ever trimmed or re-typed.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = ("system", "developer", "user", "assistant", "tool")


class ToolCall(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One call that an assistant turn makes."""

    name: str
    arguments: str
    """The arguments as JSON text, verbatim where the source gave text."""
    id: str | None = None
    verbatim: str | None = None
    """The whole call as the source wrote it, where the source wrote it as text (ShareGPT's `function_call`)."""


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One turn. `content` is None only for an assistant turn that calls tools and says nothing."""

    role: Role
    content: str | None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    weight: float = 1.0
    """What the loss on this turn counts for: 0 is context only. Meaningful for assistant turns alone."""


class Conversation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Ordered messages, and the tools that were on offer (each a JSON schema object, or a plain string)."""

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong (or odd) at one place of a file. The keys of `quarantine.jsonl` and of `validate --format json`."""

    file: str
    line: int
    """1-based, in the decompressed text; for Parquet, the 1-based row."""
    column: int
    byte_offset: int
    """Of the record's first byte, in the decompressed text; -1 where there is none (Parquet)."""
    code: str
    severity: Literal["error", "warning", "info"]
    path: str
    """Where in the record, as a JSON path (`$.messages[2].content`)."""
    message: str
    help: str = ""
