"""Templates that render an earlier turn otherwise than when it was the last: what is trained, what is told."""

from __future__ import annotations

import pytest

import tiny
from dft_common.records import Conversation, Message
from dft_prep.template.render import RenderRefusal


def reasoned(*weights: float) -> Conversation:
    turns = []
    for number, weight in enumerate(weights):
        turns.append(Message(role="user", content=f"q{number}"))
        turns.append(Message(role="assistant", content=f"a{number}", reasoning=f"r{number}", weight=weight))
    return Conversation(messages=tuple(turns))


def trained(rendered) -> list[str]:
    return [rendered.text[span.start : span.end] for span in rendered.spans]


def test_in_place_the_history_is_trained_as_it_stands_and_counted(make_encoder):
    renderer = make_encoder(tiny.THINKING).renderer
    (rendered,) = renderer.rows(reasoned(1, 1))
    assert trained(rendered) == ["a0<|im_end|>", "r1\n</think>\n\na1<|im_end|>"]
    assert "history_rewritten" in rendered.notes


@pytest.mark.parametrize("weights", [(1,), (0, 1)])
def test_nothing_is_counted_where_only_the_last_turn_is_trained(make_encoder, weights):
    assert "history_rewritten" not in make_encoder(tiny.THINKING).renderer.render(reasoned(*weights)).notes
    last = make_encoder(tiny.THINKING, train_on="last").renderer.render(reasoned(1, 1))
    assert trained(last) == ["r1\n</think>\n\na1<|im_end|>"] and "history_rewritten" not in last.notes


def test_a_template_that_rewrites_nothing_is_not_warned_of(make_encoder):
    for source in (tiny.CHATML, tiny.PHI, tiny.INSTRUCT):
        renderer = make_encoder(source).renderer
        assert not renderer.rewrites
        assert "history_rewritten" not in renderer.render(reasoned(1, 1, 1)).notes


def test_unrolled_each_turn_is_a_row_rendered_as_inference_saw_it(make_encoder):
    renderer = make_encoder(tiny.THINKING, unroll_turns=True).renderer
    conversation = reasoned(1, 1, 1)
    rows = renderer.rows(conversation)
    assert [trained(row) for row in rows] == [[f"r{n}\n</think>\n\na{n}<|im_end|>"] for n in range(3)]
    messages = renderer.prepare(conversation).messages
    for number, row in enumerate(rows):
        assert row.text == renderer.template.render(messages[: 2 * number + 2])
        assert row.turns == (2 * number + 1,) and "history_rewritten" not in row.notes


def test_unrolled_a_turn_without_weight_is_no_row(make_encoder):
    renderer = make_encoder(tiny.THINKING, unroll_turns=True).renderer
    assert [row.turns for row in renderer.rows(reasoned(1, 0, 0.5))] == [(1,), (5,)]
    assert renderer.rows(reasoned(1, 0, 0.5))[1].spans[0].weight == 0.5
    with pytest.raises(RenderRefusal) as refusal:
        renderer.rows(reasoned(0, 0))
    assert refusal.value.code == "nothing_to_train"
    last = make_encoder(tiny.THINKING, unroll_turns=True, train_on="last").renderer
    assert [row.turns for row in last.rows(reasoned(1, 1))] == [(3,)]


def test_another_end_in_the_history_is_rewriting_too(make_encoder):
    """A model that learns the end of history would not end where generation waits for the other."""
    source = tiny.CHATML.replace("<|im_end|>\n", "' + ('<|end|>' if loop.last else '<|im_end|>') + '\n")
    renderer = make_encoder(source).renderer
    assert renderer.end_of_turn == "<|end|>" and renderer.rewrites
    rendered = renderer.render(reasoned(1, 1))
    assert trained(rendered) == ["a0<|im_end|>", "a1<|end|>"] and "history_rewritten" in rendered.notes


def test_the_options_that_inference_gives_decide_where_the_reply_begins(make_encoder):
    source = tiny.CHATML.replace(
        "{{ '<|im_start|>assistant\n' }}",
        "{{ '<|im_start|>assistant\n' }}{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
    )
    conversation = Conversation(
        messages=(
            Message(role="user", content="q"),
            Message(role="assistant", content="<think>\n\n</think>\n\na"),
        )
    )
    thinking = make_encoder(source).renderer.render(conversation)
    assert trained(thinking) == ["<think>\n\n</think>\n\na<|im_end|>"]
    without = make_encoder(source, chat_template_kwargs={"enable_thinking": False}).renderer.render(conversation)
    assert trained(without) == ["a<|im_end|>"]
