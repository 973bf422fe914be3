"""Marks are no text: they go with what a template prints and captures, and change nothing of it."""

from __future__ import annotations

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from dft_prep.template.compiled import ChatTemplate
from dft_prep.template.trace import MarkedText, mark_messages

DATE = datetime.date(2026, 1, 31)
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
LOOP = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
CAPTURED = f"{{% set all %}}{LOOP}{{% endset %}}"
# What a template may do with text that was marked, and whether the messages are still told apart after.
USES = {
    "compares": (CAPTURED + "{{ 'same' if all == '[a][b]' else 'other' }}{{ all }}", True),
    "measures": (CAPTURED + "{{ all | length }}{{ all }}", True),
    "looks into it": (CAPTURED + "{{ 'a' in all }}{{ all.find('b') }}{{ all }}", True),
    "slices": (CAPTURED + "{{ all[1:-1] }}", True),
    "takes a character": (CAPTURED + "{{ all[0] }}{{ all }}", True),
    "trims": (CAPTURED + "{{ ('  ' + all + '  ') | trim }}", True),
    "strips some": (CAPTURED + "{{ all.lstrip('[').rstrip(']') }}", True),
    "adds": (CAPTURED + "{{ 'x' + all + 'y' ~ all[:0] ~ 'z' }}", True),
    "keeps it in a namespace": (CAPTURED + "{% set ns = namespace(t=all) %}{{ ns.t }}", True),
    "tests its type": (CAPTURED + "{{ all is string }}{{ all is mapping }}{{ all }}", True),
    "asks for its marks": (CAPTURED + "{{ all._marks is defined }}{{ all }}", True),
    "replaces": (CAPTURED + "{{ all | replace('[', '(') }}", False),
    "upper case": (CAPTURED + "{{ all | upper }}", False),
    "as JSON": (CAPTURED + "{{ all | tojson }}", False),
    "splits": (CAPTURED + "{{ all.split(']') | join('|') }}", False),
    "formats": (CAPTURED + "{{ '%s!' % all }}", False),
}


@pytest.mark.parametrize("name", USES)
def test_what_a_template_does_with_marked_text_is_what_it_does_with_text(name):
    source, followed = USES[name]
    template = ChatTemplate(source, NAMED, DATE)
    messages = mark_messages(tiny.turns("a", "b"))
    traced = template.trace(messages)
    assert traced.text == template.render(messages)
    found = {s.message: traced.text[s.start : s.end].strip("[]") for s in traced.stretches if s.end > s.start}
    assert found == ({0: "a", 1: "b"} if followed else {}), "lost is right, misplaced is not"


@given(st.text("ab ", max_size=6), st.text("ab ", max_size=6), st.integers(-9, 9), st.integers(-9, 9))
def test_a_slice_of_marked_text_has_the_part_of_each_stretch_that_is_in_it(first, second, start, end):
    source = CAPTURED + f"{{{{ all[{start}:{end}] }}}}"
    template = ChatTemplate(source, NAMED, DATE)
    traced = template.trace(mark_messages(tiny.turns(first, second)))
    whole = f"[{first}][{second}]"
    positions = list(range(len(whole)))[start:end]
    owner = [0 if place < len(first) + 2 else 1 for place in positions]
    assert traced.text == whole[start:end]
    for stretch in traced.stretches:
        assert owner[stretch.start : stretch.end] == [stretch.message] * (stretch.end - stretch.start)
    assert sum(stretch.end - stretch.start for stretch in traced.stretches) == len(positions)


@pytest.mark.parametrize("text", ["\ue000", "\U000f0000\U000f0001", "dft_loop_5", "", "{{ messages }}"])
def test_no_text_can_look_like_a_mark(text):
    template = ChatTemplate(CAPTURED + "{{ all }}" + LOOP, NAMED, DATE)
    messages = mark_messages(tiny.turns(text, "b"))
    traced = template.trace(messages)
    assert [s.message for s in traced.stretches if s.end > s.start] == [0, 1, 0, 1]
    assert traced.text == f"[{text}][b]" * 2


def test_marked_text_is_a_string_in_every_respect():
    plain, marked = " a b ", MarkedText(" a b ", [])
    assert marked == plain and hash(marked) == hash(plain) and len(marked) == 5 and marked.strip() == "a b"
    assert marked + "x" == " a b x" and "x" + marked == "x a b " and marked[1:2] == "a" and marked[::-1] == plain[::-1]
    assert {plain: 1}[marked] == 1 and f"{marked}" == plain and marked.split() == ["a", "b"]
