"""Templates are untrusted: none reads a file, leaves the sandbox, runs for ever or takes all memory."""

from __future__ import annotations

import contextlib
import datetime
import time

import pytest

import tiny
from dft_common.errors import SetupError
from dft_common.records import Conversation, Message
from dft_prep.template import sandbox
from dft_prep.template.compiled import ChatTemplate, TemplateRefusal
from dft_prep.template.render import Renderer, RenderRefusal
from dft_prep.template.trace import mark_messages

DATE = datetime.date(2026, 1, 31)
ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "prints": "{% for a in range(99999) %}{% for b in range(99999) %}" + "x" * 1000 + "{% endfor %}{% endfor %}",
    "captures": "{% set c %}{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}"
    "{% endfor %}{% endfor %}{% endset %}",
    "doubles": "{% set ns = namespace(x='x' * 100) %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "repeats": "{{ 'x' * 9999999999 }}",
    "raises to a power": "{{ 9999999 ** 9999999 }}",
    "pads": "{{ 'x'.ljust(9999999999) }}",
    "pads by a filter": "{{ 'x' | center(9999999999) }}",
    "formats": "{{ '%9999999999d' % 1 }}",
    "recurses": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.5)
    monkeypatch.setattr(sandbox, "MAX_GROWTH", 1 << 28)


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_ends_with_a_message(name):
    template = ChatTemplate(ENDLESS[name], {}, DATE)
    messages = mark_messages(tiny.turns("a", "b"))
    started = time.monotonic()
    for render in (template.render, template.trace):
        with pytest.raises((TemplateRefusal, sandbox.RenderLimit)) as refusal, sandbox.WATCH.render():
            render(messages)
        assert str(refusal.value)
    assert time.monotonic() - started < 10


def test_at_a_builds_start_it_is_a_setup_error(tokenizer):
    with pytest.raises(SetupError, match=r"more than 0\.5 seconds"):
        Renderer(tiny.CHATML + ENDLESS["loops"], tokenizer, DATE)


def test_for_one_conversation_it_leaves_that_one_out(tokenizer):
    source = tiny.CHATML + "{% if messages[0].content == 'loop' %}" + ENDLESS["loops"] + "{% endif %}"
    renderer = Renderer(source, tokenizer, DATE)

    def conversation(text: str) -> Conversation:
        return Conversation(messages=(Message(role="user", content=text), Message(role="assistant", content="b")))

    with pytest.raises(RenderRefusal, match="loop without end") as refusal:
        renderer.render(conversation("loop"))
    assert refusal.value.code == "template_refused"
    assert renderer.render(conversation("a")).spans


@pytest.mark.parametrize(
    "source",
    [
        "{% include '/etc/passwd' %}",
        "{% import '/etc/passwd' as p %}",
        "{% extends '/etc/passwd' %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ messages[0]._mark }}",
        "{% set ns = namespace() %}{% set ns['_x'] = 1 %}{{ ns }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
    ],
)
def test_the_sandbox_holds(source):
    messages = mark_messages(tiny.turns("a", "b"))
    text = ""
    with contextlib.suppress(TemplateRefusal):
        text = ChatTemplate(source, {}, DATE).trace(messages).text
    assert text == "" and messages[0]["role"] == "user"


def test_what_transformers_gives_a_template_is_there():
    source = (
        "{{ strftime_now('%d %b %Y') }}|{{ documents[0].text }}|{{ enable_thinking }}|"
        "{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}|{{ {'a': 'ü<'} | tojson }}"
    )
    template = ChatTemplate(source, {"documents": [{"text": "d"}], "enable_thinking": False}, DATE)
    assert template.render([]) == '31 Jan 2026|d|False|02|{"a": "ü<"}'
