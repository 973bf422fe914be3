"""A run of text has the ids that it has where it stands: behind other text, behind a control token, at the start.

Tokenizers that came from SentencePiece put a dummy space before text, by where it stands; what is encoded alone always
stands at the start.
"""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer

import tiny
from sentencepiece_cases import (
    CASES,
    conversation,
    encoded,
    encoder,
    make_encoder,
    oracle,
    runs,
    spelled,
    starts,
    turn_text,
    whole_ids,
)

every_case = pytest.mark.parametrize("case", CASES, ids=str)


@every_case
def test_a_reply_is_encoded_as_it_stands_in_a_later_prompt(case):
    contents = ["What is  it?\n", "Paris is", " 日本語", "is é\n\nit"]
    ids, live = encoded(encoder(case), conversation(contents))
    assert ids[: starts(live)[1]].tolist() == whole_ids(case, contents[:3], prompt=True)
    assert ids.tolist() == whole_ids(case, contents, prompt=False)


@every_case
def test_a_reply_that_opens_with_unknown_characters_is_trained_from_its_first(case):
    contents = ["x", "日本 is", "y", "é"]
    texts = [spelled(oracle(case), run) for run in runs(*encoded(encoder(case), conversation(contents)))]
    for number in (1, 3):
        wanted = turn_text(case, contents[number])
        assert texts[number] in (wanted, f" {wanted}")


@every_case
def test_a_control_tokens_text_in_a_reply_leaves_its_prompt_as_it_is(case):
    ids, live = encoded(encoder(case), conversation(["What is it?", "well <s>"]))
    assert ids[: starts(live)[0]].tolist() == whole_ids(case, ["What is it?"], prompt=True)


def test_a_control_token_that_is_in_the_models_vocabulary_stays_text():
    tokenizer = tiny.sentencepiece_tokenizer("unigram", "always", in_model=("<s>",))
    ids, _ = encoded(make_encoder(tokenizer, tiny.CHATML), conversation(["say <s>", "no"]))
    assert tokenizer.token_to_id("<s>") not in ids.tolist()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_reply_right_behind_a_token_that_strips_keeps_its_white_space(kind):
    source = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    source += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    tokenizer = tiny.sentencepiece_tokenizer(kind, "always", strips_right=True)
    ids, live = encoded(make_encoder(tokenizer, source), conversation(["q", "  is it"]))
    assert spelled(tokenizer, runs(ids, live)[1]).lstrip() == "is it<|end|>"
    assert spelled(tokenizer, runs(ids, live)[1]).startswith("  ")


@every_case
def test_a_reply_that_opens_as_the_guard_does_is_encoded_all_the_same(case):
    """With pieces of two characters that a guard could be half of."""
    data = json.loads(oracle(case).to_str())
    if data["model"]["type"] != "BPE":
        return
    vocabulary = data["model"]["vocab"]
    for text in ("\n", "\t"):
        for piece in (text, text * 2):
            vocabulary[piece] = max(vocabulary.values()) + 1
        data["model"]["merges"].append([text, text])
    for token in data["added_tokens"]:
        token["id"] += 4
    tokenizer = Tokenizer.from_str(json.dumps(data))
    made = make_encoder(tokenizer, tiny.TEMPLATES[case.template])
    for opening in ("\n", "\t", "x", "\n\t"):
        ids, live = encoded(made, conversation(["a", f"{opening}b"]))
        assert spelled(tokenizer, runs(ids, live)[1]).strip().startswith(f"{opening}b".strip())
