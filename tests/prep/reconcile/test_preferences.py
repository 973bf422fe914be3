"""Preference data as it is found: what `chosen` replies to may stand in many fields, and only the chosen is read."""

from __future__ import annotations

import pytest

from dft_prep.reconcile.converters import RecordError
from dft_prep.reconcile.record import reconcile

Q = {"role": "user", "content": "q"}
A = {"role": "assistant", "content": " a\u2028\n"}
REPLY = A["content"]
DIALOGUE = "\n\nHuman: q0\n\nAssistant: a0\n\nHuman: q"
WHOLE = [("user", "q0"), ("assistant", "a0"), ("user", "q"), ("assistant", REPLY)]
PAIR = [("user", "q"), ("assistant", REPLY)]

RECORDS = {
    "prompt": ({"prompt": "q", "chosen": REPLY}, PAIR),
    "question": ({"question": "q", "chosen": REPLY}, PAIR),
    "input": ({"input": "q", "chosen": REPLY, "generations": ["x", "y"]}, PAIR),
    "instruction": ({"instruction": "q", "input": "", "chosen": REPLY}, PAIR),
    "instruction-and-input": ({"instruction": "q", "input": "i", "chosen": REPLY}, [("user", "q\ni"), PAIR[1]]),
    "instruction-and-history": ({"instruction": "q", "history": [["q0", "a0"]], "chosen": REPLY}, WHOLE),
    "prompt-and-history": ({"prompt": "q", "history": [["q0", "a0"]], "chosen": REPLY}, WHOLE),
    "prompt-of-messages": ({"prompt": [Q], "chosen": [A]}, PAIR),
    "prompt-of-messages-and-text": ({"prompt": [Q], "chosen": REPLY}, PAIR),
    "one-message": ({"prompt": "q", "chosen": A}, PAIR),
    "messages-without-a-reply": ({"messages": [Q], "chosen": A}, PAIR),
    "conversations-without-a-reply": (
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": REPLY}},
        PAIR,
    ),
    "whole-beside-its-prompt": ({"prompt": "q", "chosen": [Q, A]}, PAIR),
    "dialogue": ({"chosen": f"{DIALOGUE}\n\nAssistant: {REPLY}"}, WHOLE),
    "dialogue-beside-its-prompt": (
        {"prompt": f"{DIALOGUE}\n\nAssistant:", "chosen": f"{DIALOGUE}\n\nAssistant: {REPLY}"},
        WHOLE,
    ),
    "dialogue-beside-its-question": ({"prompt": "q", "chosen": f"{DIALOGUE}\n\nAssistant: {REPLY}"}, WHOLE),
    "whole-beside-its-messages": ({"prompt": [Q], "messages": [Q], "chosen": [Q, A]}, PAIR),
    "dialogue-before-the-reply": ({"prompt": f"{DIALOGUE}\n\nAssistant:", "chosen": REPLY}, WHOLE),
    "dialogue-before-the-reply-and-a-space": ({"prompt": f"{DIALOGUE}\n\nAssistant: ", "chosen": REPLY}, WHOLE),
    # No dialogue as a whole: a question that quotes one.
    "quoted-dialogue": (
        {"prompt": "Go on:\n\nHuman: x\n\nAssistant:", "chosen": REPLY},
        [("user", "Go on:\n\nHuman: x\n\nAssistant:"), PAIR[1]],
    ),
    "quoted-speaker": (
        {"prompt": "\n\nHuman:x\n\nAssistant:", "chosen": REPLY},
        [("user", "\n\nHuman:x\n\nAssistant:"), PAIR[1]],
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_the_chosen_reply_follows_its_prompt_and_no_character_changes(name):
    record, expected = RECORDS[name]
    reconciled = reconcile({**record, "rejected": "no"})
    assert reconciled.format == "preference"
    assert [(message.role, message.content) for message in reconciled.conversation.messages] == expected


@pytest.mark.parametrize(
    ("record", "index", "part", "path"),
    [
        ({"prompt": "q", "chosen": A}, 1, "content", "$.chosen.content"),
        ({"prompt": "q", "chosen": {"from": "gpt", "value": "a"}}, 1, "role", "$.chosen.from"),
        ({"prompt": [Q], "chosen": [A]}, 1, "content", "$.chosen[0].content"),
        (RECORDS["conversations-without-a-reply"][0], 0, "content", "$.conversations[0].value"),
        (RECORDS["instruction-and-history"][0], 0, "content", "$.history[0][0]"),
        (RECORDS["dialogue-before-the-reply"][0], 2, "content", "$.prompt"),
    ],
)
def test_a_place_is_where_its_author_wrote_it(record, index, part, path):
    assert reconcile(record).place(index, part) == path


def test_a_whole_conversation_beside_another_choice_is_ambiguous():
    with pytest.raises(RecordError) as refusal:
        reconcile({"messages": [Q, A], "prompt": "q", "chosen": "another", "rejected": "no"})
    assert refusal.value.code == "ambiguous_shape"
    assert "openai" in refusal.value.message and "preference" in refusal.value.message


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"prompt": [{"role": "system", "content": "s"}, Q], "chosen": [Q, A]}, "prompt"),
        ({"prompt": [Q, A, Q], "chosen": [Q, A]}, "prompt"),
        ({"conversations": [{"from": "human", "value": "other"}], "chosen": [Q, A]}, "conversations"),
        ({"prompt": "other", "chosen": "\n\nHuman: q\n\nAssistant: a"}, "prompt"),
    ],
    ids=["its-system-turn", "its-history", "another", "another-dialogue"],
)
def test_a_whole_choice_beside_another_prompt_is_ambiguous(record, named):
    with pytest.raises(RecordError) as refusal:
        reconcile({**record, "rejected": "no"})
    assert (refusal.value.code, refusal.value.path) == ("ambiguous_shape", "$.chosen")
    assert named in refusal.value.message


@pytest.mark.parametrize(
    ("chosen", "code", "path"),
    [
        ("a reply to nothing", "unknown_shape", "$.chosen"),
        (7, "content_type", "$.chosen"),
        ({"role": "asistant", "content": "a"}, "unknown_role", "$.chosen.role"),
        ({"role": "assistant", "content": None}, "null_content", "$.chosen.content"),
        ([], "empty_conversation", "$.chosen"),
    ],
    ids=["no-prompt", "number", "role", "null", "empty"],
)
def test_a_choice_that_cannot_be_read_is_refused(chosen, code, path):
    with pytest.raises(RecordError) as refusal:
        reconcile({"chosen": chosen, "rejected": "no"})
    assert (refusal.value.code, refusal.value.path) == (code, path)
