"""Two tokenizers mean the same when every text gives the same ids, whatever their files' bytes."""

from __future__ import annotations

import copy
import json

import tiny
from dft_common.fingerprint import describe_difference, tokenizer_fingerprint, tokenizer_meaning

TOKENIZER = json.loads(tiny.byte_tokenizer().to_str())
NAMES = ("the dataset", "the model")


def changed(change) -> dict:
    other = copy.deepcopy(TOKENIZER)
    change(other)
    return other


def difference(other: dict) -> list[str]:
    return describe_difference(tokenizer_meaning(TOKENIZER), tokenizer_meaning(other), NAMES)


def test_spelling_does_not_matter():
    def respell(t):
        t["model"]["merges"] = [
            merge if isinstance(merge, str) else " ".join(merge) for merge in reversed(t["model"]["merges"])
        ][::-1]
        t["model"]["vocab"] = dict(reversed(t["model"]["vocab"].items()))
        t["added_tokens"].reverse()
        t["truncation"] = {"max_length": 5}
        t["post_processor"] = None

    other = changed(respell)
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(TOKENIZER)
    assert difference(other) == []


def test_each_part_of_the_meaning_is_told():
    swapped = changed(lambda t: t["model"]["merges"].reverse())
    assert difference(swapped)[0].startswith("merges:")
    more = changed(lambda t: t["added_tokens"].append({**t["added_tokens"][0], "content": "<|new|>", "id": 9999}))
    assert any("only the model has '<|new|>'" in line for line in difference(more))
    moved = changed(lambda t: t["model"]["vocab"].update(a=12345))
    assert any(line.startswith("vocabulary: 1 differ, the first 'a'") for line in difference(moved))
    lower = changed(lambda t: t.update(normalizer={"type": "Lowercase"}))
    assert difference(lower)[0].startswith("normalizer:")
    for other in (swapped, more, moved, lower):
        assert tokenizer_fingerprint(other) != tokenizer_fingerprint(TOKENIZER)
