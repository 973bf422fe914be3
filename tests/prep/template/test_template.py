"""Tracing: the marks never change what a template prints, and each message gets its exact stretch."""

from __future__ import annotations

import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from dft_prep.template.compiled import ChatTemplate, TemplateRefusal
from dft_prep.template.trace import mark_messages

DATE = datetime.date(2026, 1, 31)
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
LOOPS = {
    "slice": "{% for m in messages[1:] %}[{{ m.content }}]{% endfor %}",
    "continue": "{% for m in messages %}{% if m.role == 'user' %}U{% continue %}{% endif %}"
    "[{{ m.content }}]{% endfor %}",
    "break": "{% for m in messages %}[{{ m.content }}]{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}",
    "enumerate": "{% for i, m in [(0, messages[0]), (1, messages[1])] %}{{ i }}[{{ m.content }}]{% endfor %}",
    "nested": "{% for m in messages %}{% for n in messages %}{% endfor %}[{{ m.content }}]{% endfor %}",
    "macro": "{% macro show(m) %}[{{ m.content }}]{% endmacro %}{% for m in messages %}{{ show(m) }}{% endfor %}",
    "block": "{% set all %}{% for m in messages %}[{{ m.content }}]{% endfor %}{% endset %}{{ all }}",
    "else": "{% for m in [] %}{% else %}none{% endfor %}{% for m in messages %}[{{ m.content }}]{% endfor %}",
    "rebuilt": "{% set ns = namespace(l=[]) %}{% for m in messages %}{% set ns.l = ns.l + [m] %}{% endfor %}"
    "{% for m in ns.l %}[{{ m.content }}]{% endfor %}",
}


def printed(template: ChatTemplate, messages: list[dict]) -> dict[int, str]:
    traced = template.trace(mark_messages(messages))
    return {s.message: traced.text[s.start : s.end] for s in traced.stretches if s.end > s.start}


@pytest.mark.parametrize("source", [*tiny.TEMPLATES.values(), *LOOPS.values()])
@settings(max_examples=30)
@given(texts=st.lists(st.text(), min_size=4, max_size=4))
def test_the_traced_render_is_the_plain_render(source, texts):
    template = ChatTemplate(source, NAMED, DATE)
    messages = tiny.turns(*texts)
    for prompt in (False, True):
        assert template.trace(mark_messages(messages), prompt=prompt).text == template.render(messages, prompt=prompt)


@pytest.mark.parametrize("name", LOOPS)
def test_each_message_gets_its_own_stretch(name):
    found = printed(ChatTemplate(LOOPS[name], NAMED, DATE), tiny.turns("a", "b", "c", "d"))
    assert found, "nothing was traced"
    for number, text in found.items():
        assert text.endswith(f"[{'abcd'[number]}]") or text == "U"


def test_equal_messages_are_told_apart_by_identity():
    found = printed(ChatTemplate(LOOPS["else"], NAMED, DATE), tiny.turns("same", "same", "same", "same"))
    assert sorted(found) == [0, 1, 2, 3]


def test_a_template_that_raises_or_does_not_parse_is_a_refusal():
    with pytest.raises(TemplateRefusal, match="no system"):
        ChatTemplate("{{ raise_exception('no system') }}", NAMED, DATE).render([])
    with pytest.raises(TemplateRefusal, match="line 2"):
        ChatTemplate("a\n{% for %}", NAMED, DATE)


def test_renders_as_transformers_does():
    transformers = pytest.importorskip("transformers.utils.chat_template_utils")
    for source in tiny.TEMPLATES.values():
        messages = tiny.turns("Hi ", " there\n", "more", "<end>")
        for prompt in (False, True):
            theirs, _ = transformers.render_jinja_template(
                [messages], chat_template=source, add_generation_prompt=prompt, **NAMED
            )
            assert ChatTemplate(source, NAMED, DATE).render(messages, prompt=prompt) == theirs[0]
