"""Duplicates and the validation split are decided by content alone."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dft_common.records import Conversation, Message
from dft_prep.shards.split import KEY_DTYPE, conversation_key, duplicates, in_validation


def conversation(*contents: str, weight: float = 1.0) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(
        messages=tuple(
            Message(role=roles[i % 2], content=c, weight=weight if i % 2 else 1.0) for i, c in enumerate(contents)
        )
    )


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 2)), max_size=50))
def test_the_first_of_equal_rows_is_kept(rows):
    keys = np.array(rows, KEY_DTYPE)
    seen: set[tuple[int, int, int]] = set()
    expected = []
    for row in rows:
        expected.append(row in seen)
        seen.add(row)
    assert duplicates(keys).tolist() == expected


def test_the_border_between_messages_is_part_of_the_key():
    keys = {
        conversation_key(conversation(*contents)) for contents in (("ab", "c"), ("a", "bc"), ("abc",), ("ab", "c", ""))
    }
    assert len(keys) == 4


def test_weights_alone_make_no_duplicate_but_stay_on_one_side():
    plain, weighted = conversation_key(conversation("a", "b")), conversation_key(conversation("a", "b", weight=0.5))
    assert plain[0] == weighted[0]
    assert plain[1] != weighted[1]


def test_the_share_is_as_asked_and_the_seed_changes_who():
    hashes = np.random.default_rng(0).integers(0, 2**64, 100_000, np.uint64)
    for percentage in (0.0, 2.0, 50.0, 100.0):
        share = in_validation(hashes, percentage, 42).mean() * 100
        assert abs(share - percentage) < 0.5
    first, second = in_validation(hashes, 50, 42), in_validation(hashes, 50, 43)
    assert 0.45 < (first == second).mean() < 0.55


def test_a_larger_percentage_only_adds():
    hashes = np.random.default_rng(1).integers(0, 2**64, 10_000, np.uint64)
    small, large = in_validation(hashes, 2, 42), in_validation(hashes, 10, 42)
    assert not (small & ~large).any()
