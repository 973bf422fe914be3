"""The mask rule: live is exactly what the model would have generated. `spans`, `render` and `encode` together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from dft_common.errors import DataError, SetupError
from dft_common.records import Conversation, Message, ToolCall
from dft_prep.encode.checks import self_check
from dft_prep.template.render import RenderRefusal
from dft_prep.tokenizer_files import load_tokenizer

TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=40).filter(str.strip)


def conversation(*contents: str, system: str | None = None, weights: dict[int, float] | None = None) -> Conversation:
    messages = [
        Message(role=m["role"], content=m["content"], weight=(weights or {}).get(i, 1.0))
        for i, m in enumerate(tiny.turns(*contents, system=system))
    ]
    return Conversation(messages=tuple(messages))


def live_runs(encoder, item: Conversation) -> list[list[int]]:
    """The ids of each run of trained tokens."""
    batch = encoder.encode([encoder.renderer.render(item)])
    edges = np.flatnonzero(np.diff(np.concatenate([[0], batch.weights > 0, [0]])))
    return [batch.input_ids[a:b].tolist() for a, b in zip(edges[::2], edges[1::2], strict=True)]


def live_texts(encoder, item: Conversation) -> list[str]:
    return [encoder.reference._whole.decode(run, skip_special_tokens=False) for run in live_runs(encoder, item)]


ENDS = {
    "chatml": "<|im_end|>",
    "phi": "<|end|>",
    "instruct": " <|im_end|>",
    "thinking": "<|im_end|>",
    "tagged": "<|im_end|>",
}


@pytest.mark.parametrize("name", tiny.TEMPLATES)
def test_a_reply_is_trained_to_its_end_of_turn_token_and_nothing_else_is(make_encoder, name):
    encoder = make_encoder(tiny.TEMPLATES[name])
    texts = live_texts(encoder, conversation("first question", "first reply", "second question", "second reply"))
    start = " " if name == "instruct" else ""
    assert texts == [f"{start}first reply{ENDS[name]}", f"{start}second reply{ENDS[name]}"]


@settings(max_examples=60)
@given(contents=st.lists(TEXT, min_size=4, max_size=4))
def test_every_reply_is_live_verbatim_whatever_it_holds(chatml_encoder, contents):
    texts = live_texts(chatml_encoder, conversation(*contents))
    assert texts == [f"{contents[1]}<|im_end|>", f"{contents[3]}<|im_end|>"]


@pytest.fixture(scope="module")
def chatml_encoder(tokenizer):
    import datetime

    from dft_prep.encode.batch import BatchEncoder
    from dft_prep.encode.encoders import ReferenceEncoder
    from dft_prep.template.render import Renderer

    reference = ReferenceEncoder(tokenizer)
    renderer = Renderer(tiny.CHATML, tokenizer, datetime.date(2026, 1, 31))
    return BatchEncoder(renderer, tokenizer, reference, reference)


@pytest.mark.parametrize("name", ["chatml", "phi", "instruct", "tagged"])
@pytest.mark.parametrize("strips_right", [False, True])
def test_the_prompts_ids_are_those_that_inference_feeds(make_encoder, tmp_path, name, strips_right):
    transformers = pytest.importorskip("transformers")
    made = tiny.byte_tokenizer(strips_right=strips_right)
    directory = tiny.write_tokenizer(tmp_path, tiny.TEMPLATES[name], made)
    encoder = make_encoder(tiny.TEMPLATES[name], load_tokenizer(str(directory)))
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    messages = tiny.turns("Hello  there\n\nfriend", "hi ", "two\n", "x")
    item = conversation(*(m["content"] for m in messages))
    batch = encoder.encode([encoder.renderer.render(item)])
    starts = np.flatnonzero(np.diff(np.concatenate([[0], batch.weights > 0])) == 1)
    for number, start in zip((1, 3), starts, strict=True):
        prompt = theirs.apply_chat_template(messages[:number], add_generation_prompt=True, return_dict=False)
        assert batch.input_ids[:start].tolist() == prompt


def test_control_tokens_in_text_stay_text(make_encoder, tokenizer):
    encoder = make_encoder(tiny.CHATML)
    item = conversation("say <|im_end|>", "well: <|im_end|>\n<|im_start|>user")
    batch = encoder.encode([encoder.renderer.render(item)])
    ids = {token.text: token.id for token in tokenizer.control_tokens()}
    assert (batch.input_ids == ids["<|im_end|>"]).sum() == 2
    assert (batch.input_ids == ids["<|im_start|>"]).sum() == 2
    assert live_texts(encoder, item) == ["well: <|im_end|>\n<|im_start|>user<|im_end|>"]


def test_control_tokens_in_text_can_be_refused(make_encoder):
    item = conversation("say <|im_end|>", "no")
    with pytest.raises(RenderRefusal) as refusal:
        make_encoder(tiny.CHATML, special_tokens_in_text="quarantine").renderer.render(item)
    assert (refusal.value.code, refusal.value.path) == ("control_token_in_text", "$.messages[0].content")
    with pytest.raises(DataError, match="control token"):
        make_encoder(tiny.CHATML, special_tokens_in_text="error").renderer.render(item)


def test_weights_and_train_on(make_encoder):
    item = conversation("a", "first", "b", "second", "c", "third", weights={1: 0.0, 3: 0.25})
    encoder = make_encoder(tiny.CHATML)
    assert live_texts(encoder, item) == ["second<|im_end|>", "third<|im_end|>"]
    batch = encoder.encode([encoder.renderer.render(item)])
    assert set(np.unique(batch.weights).tolist()) == {0.0, 0.25, 1.0}
    assert live_texts(make_encoder(tiny.CHATML, train_on="last"), item) == ["third<|im_end|>"]


def test_an_eos_after_the_whole_conversation_is_not_trained(make_encoder):
    encoder = make_encoder(tiny.PHI)
    assert encoder.renderer.render(conversation("a", "b")).text.endswith("<|end|>\n<|im_end|>")
    assert live_texts(encoder, conversation("a", "b")) == ["b<|end|>"]


def test_a_generation_prompt_that_opens_thinking_does_not_eat_the_reply(make_encoder):
    encoder = make_encoder(tiny.THINKING)
    assert encoder.renderer.prompts[0].endswith("<think>\n")
    messages = (
        Message(role="user", content="q"),
        Message(role="assistant", content="old reply", reasoning="old reason"),
        Message(role="user", content="q2"),
        Message(role="assistant", content="new reply", reasoning="new reason"),
    )
    item = Conversation(messages=messages)
    assert live_texts(encoder, item) == ["old reply<|im_end|>", "new reason\n</think>\n\nnew reply<|im_end|>"]
    assert "reasoning_not_printed" in encoder.renderer.render(item).notes


def tool_conversation(verbatim: str | None = None) -> Conversation:
    call = ToolCall(name="add", arguments='{"a": 1.50, "b": "ü"}', verbatim=verbatim)
    messages = (
        Message(role="user", content="1.5 + ü?"),
        Message(role="assistant", content=None, tool_calls=(call,)),
        Message(role="tool", content="RESULT"),
        Message(role="assistant", content="done"),
    )
    return Conversation(messages=messages, tools=({"name": "add", "parameters": {}},))


def test_tool_calls_are_printed_by_a_template_that_knows_them(make_encoder):
    encoder = make_encoder(tiny.THINKING)
    texts = live_texts(encoder, tool_conversation())
    assert texts[0] == '<tool_call>\n{"name": "add", "arguments": {"a": 1.5, "b": "ü"}}\n</tool_call><|im_end|>'
    assert texts[1] == "done<|im_end|>"


def test_tool_calls_that_a_template_drops_become_text(make_encoder):
    encoder = make_encoder(tiny.CHATML)
    assert live_texts(encoder, tool_conversation())[0] == ('{"name":"add","arguments":{"a": 1.50, "b": "ü"}}<|im_end|>')
    written = '{"name": "add",  "arguments": {}}'
    assert live_texts(encoder, tool_conversation(written))[0] == written + "<|im_end|>"
    notes = encoder.renderer.render(tool_conversation()).notes
    assert {"tool_calls_as_text", "tools_not_printed"} <= set(notes)
    with pytest.raises(RenderRefusal) as refusal:
        make_encoder(tiny.CHATML, unsupported_tools="quarantine").renderer.render(tool_conversation())
    assert refusal.value.code == "tool_calls_not_printed"
    with pytest.raises(DataError):
        make_encoder(tiny.CHATML, unsupported_tools="error").renderer.render(tool_conversation())


def test_a_template_that_prints_results_inside_the_reply_is_refused_for_them(make_encoder):
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' + m.content }}"
        "{% for n in messages if n.role == 'tool' %}{{ n.content }}{% endfor %}{{ '<|im_end|>' }}"
        "{% elif m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    encoder = make_encoder(source)
    assert live_texts(encoder, conversation("a", "b")) == ["b<|im_end|>"]
    with pytest.raises(RenderRefusal) as refusal:
        encoder.renderer.render(tool_conversation())
    assert refusal.value.code == "mask_unsure"


def test_a_template_that_measures_marked_text_sees_the_text_alone(make_encoder):
    source = (
        tiny.CHATML + "{% set all %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}{{ all | length }}"
    )
    encoder = make_encoder(source)
    item = conversation("aaa", "bbbb")
    assert encoder.renderer.render(item).text.endswith("<|im_end|>\n7")
    assert live_texts(encoder, item) == ["bbbb<|im_end|>"]


def test_what_a_template_raises_leaves_the_record_out(make_encoder):
    with pytest.raises(RenderRefusal, match="Only user and assistant"):
        make_encoder(tiny.INSTRUCT).renderer.render(conversation("a", "b", system="s"))


def test_a_template_that_prints_no_conversation_is_a_setup_error(make_encoder):
    with pytest.raises(SetupError, match="cannot be used"):
        make_encoder("{{ messages[0].content }}")


def test_a_template_without_an_end_of_turn_token_trains_to_the_replys_end(make_encoder):
    source = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    encoder = make_encoder(source)
    assert encoder.renderer.end_of_turn is None
    assert live_texts(encoder, conversation("a", "b", "c", "d")) == ["b", "d"]


@pytest.mark.parametrize("name", tiny.TEMPLATES)
def test_the_self_check_compares_every_prompt_it_can(make_encoder, name):
    encoder = make_encoder(tiny.TEMPLATES[name])
    done = self_check(encoder.renderer, encoder, [])
    assert done["conversations"] >= 6
    assert done.get("prompts", 0) + done.get("prompts_rewritten", 0) + done.get("turns_tagged", 0) >= 12


def test_the_self_check_fails_for_a_wrong_span(make_encoder, monkeypatch):
    import msgspec

    encoder = make_encoder(tiny.CHATML)
    wrong = msgspec.structs.replace(encoder.renderer.rules, prompt="<|im_start|>assist")
    monkeypatch.setattr(encoder.renderer, "rules", wrong)
    with pytest.raises(DataError, match="self-check failed"):
        self_check(encoder.renderer, encoder, [])


def test_a_piece_behind_other_text_gets_no_space_that_the_text_does_not_have(make_encoder, tmp_path):
    source = (
        "{% for m in messages %}{{ m.role + ':' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    directory = tiny.write_tokenizer(tmp_path, source, tiny.prefix_space_tokenizer())
    encoder = make_encoder(source, load_tokenizer(str(directory)))
    assert encoder.neighbours.guards
    assert live_texts(encoder, conversation("a", "reply", "b", "again")) == ["reply<|im_end|>", "again<|im_end|>"]


def test_a_result_that_the_template_drops_is_told_even_where_the_reply_repeats_it(make_encoder):
    messages = (
        Message(role="user", content="w?"),
        Message(role="assistant", content="call"),
        Message(role="tool", content="42"),
        Message(role="assistant", content="It is 42"),
    )
    assert "tool_not_printed" in make_encoder(tiny.PHI).renderer.render(Conversation(messages=messages)).notes
