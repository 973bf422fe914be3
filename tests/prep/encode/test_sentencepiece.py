"""Masks and ids of tokenizers that came from SentencePiece: `▁` for spaces, bytes for characters they do not know.

What holds: the ids before a trained turn are those of its prompt's whole text, by `tokenizers` itself; a trained run
spells its turn and nothing else, every character whole; a control token's text is never the control token.

What the tokens themselves cannot keep, and nothing more: a dummy space may stand before a run (decoding takes one
space away again, a real one too); a typed `▁` is read as a space; a Unigram reads a typed `<0x41>` as the byte.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from sentencepiece_cases import (
    CASES,
    conversation,
    encoded,
    encoder,
    oracle,
    runs,
    spelled,
    starts,
    turn_text,
    whole_ids,
)

PARTS = (
    "a",
    "The",
    "Paris is",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "▁",
    "<0x41>",
    "\ufffd",
    "👍🏽",
    "日本語",
    "é",
    "<",
    "?",
)
PIECE = st.sampled_from(PARTS) | st.characters(exclude_categories=("Cs",))
TEXT = st.lists(PIECE, min_size=1, max_size=6).map("".join)
CONTENTS = st.lists(
    TEXT.filter(lambda text: text.strip() and not any(token in text for token in tiny.CONTROL)), min_size=4, max_size=4
)
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def test_characters_that_the_vocabulary_lacks_become_bytes():
    for case in CASES:
        tokens = oracle(case).encode("日", add_special_tokens=False).tokens
        assert tokens == ["▁", "<0xE6>", "<0x97>", "<0xA5>"]


@every_case
@settings(max_examples=5)
@given(contents=CONTENTS)
def test_a_prompts_ids_are_those_of_its_whole_text(case, contents):
    for number in (1, 3):
        ids, live = encoded(encoder(case), conversation(contents[: number + 1], trained=(number,)))
        (start,) = starts(live)
        assert ids[:start].tolist() == whole_ids(case, contents[:number], prompt=True)


@pytest.mark.parametrize("case", [case for case in CASES if case.strips_right], ids=str)
def test_a_prompts_ids_are_those_of_transformers(case, tmp_path):
    transformers = pytest.importorskip("transformers")
    directory = tiny.write_tokenizer(tmp_path, tiny.TEMPLATES[case.template], oracle(case))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    contents = [" Paris  is\n\n日本語 ▁<0x41>", "a reply 👍🏽\n", "\ttwo\n", "x"]
    for number in (1, 3):
        ids, live = encoded(encoder(case), conversation(contents[: number + 1], trained=(number,)))
        messages = tiny.turns(*contents)[:number]
        prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids[: starts(live)[0]].tolist() == prompt


@every_case
@settings(max_examples=5)
@given(contents=CONTENTS)
def test_a_trained_run_spells_its_turn_and_no_character_is_cut(case, contents):
    parts = runs(*encoded(encoder(case), conversation(contents)))
    texts = [spelled(oracle(case), run) for run in parts]  # raises for half a character, in the context too
    for number in (1, 3):
        wanted = turn_text(case, contents[number])
        assert texts[number] in (wanted, f" {wanted}")
        decoded = oracle(case).decode(parts[number], skip_special_tokens=False)
        assert decoded in (wanted, wanted.removeprefix(" "))


@every_case
@settings(max_examples=5)
@given(contents=st.lists(st.lists(PIECE | st.sampled_from(tiny.CONTROL)).map("".join), min_size=4, max_size=4))
def test_a_control_tokens_text_stays_text(case, contents):
    contents = [f"<s>{text}<|im_end|>" for text in contents]
    control = {token.id for token in encoder(case).control.values()}
    ids, live = encoded(encoder(case), conversation(contents))
    plain, _ = encoded(encoder(case), conversation(["w", "x", "y", "z"]))
    assert Counter(i for i in ids.tolist() if i in control) == Counter(i for i in plain.tolist() if i in control)
    texts = [spelled(oracle(case), run) for run in runs(ids, live)]
    for number in (1, 3):
        wanted = turn_text(case, contents[number])
        assert texts[number] in (wanted, f" {wanted}")


@every_case
def test_a_typed_byte_is_the_byte_token_only_where_tokenizers_itself_makes_it_so(case):
    byte = oracle(case).token_to_id("<0x41>")
    ids, live = encoded(encoder(case), conversation(["say <0x41>", "well <0x41>"]))
    count = sum(run.count(byte) for run in runs(ids, live)[:2])
    itself = oracle(case).encode("say <0x41>", add_special_tokens=False).ids.count(byte)
    assert (count, itself) == ((2, 1) if case.kind.startswith("unigram") else (0, 0))
