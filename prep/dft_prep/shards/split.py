"""Which conversations are the same, and which side of the split each is on: by content hash alone.

Called by `work` (hash) and `assemble` (duplicates, split). The hash is of roles, texts, calls and tools,
whatever the tokenizer, file or id: a conversation and its duplicates stay on one side for ever.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import xxhash

from dft_common.records import Conversation

KEY_DTYPE = np.dtype([("content", "<u8"), ("weights", "<u8"), ("turn", "<u4")])
"""20 bytes a row: the conversation's hash, that of it with per-message weights, and which of its rows this is."""

_encoder = msgspec.json.Encoder()


def conversation_key(conversation: Conversation) -> tuple[int, int]:
    """(hash of the content, hash of content and weights). Two that differ in weights alone are no duplicates."""
    state = xxhash.xxh3_64()
    for message in conversation.messages:
        parts = (
            message.role,
            message.content,
            message.reasoning,
            [(call.name, call.arguments) for call in message.tool_calls],
        )
        state.update(_encoder.encode(parts))
    state.update(_encoder.encode(conversation.tools))
    content = state.intdigest()
    weights = [message.weight for message in conversation.messages if message.role == "assistant"]
    if all(weight == 1 for weight in weights):
        return content, content
    state.update(_encoder.encode(weights))
    return content, state.intdigest()


def same_key(conversation: Conversation) -> bytes:
    """16 bytes, equal for two conversations exactly where `conversation_key` is, and quicker; never stored."""
    messages = conversation.messages
    parts: list[Any] = [(message.role, message.content, message.reasoning) for message in messages]
    for number, message in enumerate(messages):
        if message.tool_calls:
            parts.append((number, [(call.name, call.arguments) for call in message.tool_calls]))
        if message.weight != 1 and message.role == "assistant":
            parts.append((number, message.weight))
    if conversation.tools:
        parts.append(conversation.tools)
    return xxhash.xxh3_128_digest(_encoder.encode(parts))


def row_id(content: int) -> str:
    """The stored `id`: 16 hex digits of the content hash."""
    return f"{content:016x}"


def duplicates(keys: np.ndarray) -> np.ndarray:
    """[rows] bool: True for every row whose key came before. keys: KEY_DTYPE, in the order of the corpus."""
    order = np.lexsort((keys["turn"], keys["weights"], keys["content"]))  # stable: equal keys stay in corpus order
    ordered = keys[order]
    repeated = np.zeros(len(keys), bool)
    repeated[order[1:]] = ordered[1:] == ordered[:-1]
    return repeated


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): spreads a 64-bit value over all its bits."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def in_validation(content: np.ndarray, percentage: float, seed: int) -> np.ndarray:
    """[rows] bool: whether each content hash (uint64) falls into the validation split."""
    with np.errstate(over="ignore"):
        salted = content + np.uint64(seed % 2**64) * np.uint64(0x9E3779B97F4A7C15)
    share = (_mix(salted) >> np.uint64(11)).astype(np.float64) / 2.0**53
    return share < percentage / 100
