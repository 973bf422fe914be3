"""The fast engine is used only where it gives the ids that `tokenizers` gives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from dft_common.records import Conversation, Message
from dft_prep.encode.batch import BatchEncoder
from dft_prep.encode.encoders import (
    EncoderMismatch,
    FastEncoder,
    ReferenceEncoder,
    choose_encoder,
    same_ids,
    torture_texts,
)


@pytest.fixture(scope="module")
def engines(tokenizer):
    return FastEncoder(tokenizer), ReferenceEncoder(tokenizer)


@given(texts=st.lists(st.text(), max_size=8))
def test_both_engines_give_the_same_ids(engines, texts):
    fast, reference = engines
    assert same_ids(fast.encode(texts), reference.encode(texts))


def test_neither_makes_a_control_token_of_text(engines, tokenizer):
    control = {token.id for token in tokenizer.control_tokens()}
    for engine in engines:
        ids, _ = engine.encode(list(tiny.CONTROL))
        assert len(ids)
        assert not control & set(ids.tolist())


def test_added_tokens_that_are_not_special_are_recognised_in_text(engines):
    for engine in engines:
        _, offsets = engine.encode(["<think>", "</think>"])
        assert offsets.tolist() == [0, 1, 2]


class Lying(FastEncoder):
    """Wrong for one text only."""

    def encode(self, texts):
        ids, offsets = super().encode(texts)
        if any("jumps" in text for text in texts):
            ids = ids.copy()
            ids[-1] += 1
        return ids, offsets


def test_an_engine_that_is_wrong_or_refuses_is_not_chosen(tokenizer, monkeypatch):
    reference = ReferenceEncoder(tokenizer)
    assert choose_encoder("auto", tokenizer, reference, []).name == "fastokens"
    assert choose_encoder("tokenizers", tokenizer, reference, []) is reference
    monkeypatch.setattr("dft_prep.encode.encoders.FastEncoder", Lying)
    assert choose_encoder("auto", tokenizer, reference, ["a fox jumps"]) is reference

    def refuse(*_):
        raise ValueError("unsupported pre-tokenizer")

    monkeypatch.setattr("dft_prep.encode.encoders.FastEncoder", refuse)
    assert choose_encoder("auto", tokenizer, reference, []) is reference


def test_a_difference_during_the_build_is_found(make_encoder, tokenizer):
    base = make_encoder(tiny.CHATML)
    encoder = BatchEncoder(base.renderer, tokenizer, Lying(tokenizer), base.reference)
    messages = (Message(role="user", content="q"), Message(role="assistant", content="it jumps"))
    with pytest.raises(EncoderMismatch):
        encoder.check(encoder.renderer.render(Conversation(messages=messages)))


def test_the_torture_set_has_every_added_token(tokenizer):
    texts = torture_texts(tokenizer)
    assert set(tiny.CONTROL) <= set(texts)
    assert len(texts) > 100


def test_no_texts_give_no_ids(engines):
    for engine in engines:
        ids, offsets = engine.encode([])
        assert len(ids) == 0
        assert np.array_equal(offsets, [0])
