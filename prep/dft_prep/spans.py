"""Where the trained stretch of each assistant turn begins and ends in a traced render.

Called by `render`, and by `probes` when it learns a template. The rule: a label is live exactly where the
model would have generated that token, from the end of the generation prompt to the end-of-turn token.
The beginning is found by the first of these that holds:

1. after the generation prompt, where the turn opens with it;
2. where the render of the messages before it, with the generation prompt, ends (templates without a prompt);
3. after the learnt header: what generation prompt and turns have in common (templates whose prompt opens
   `<think>` although earlier turns are printed without it).

Templates that mark their replies with `{% generation %}` are taken at their word instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from dft_prep.template import Stretch, Traced


class MaskUnsure(Exception):
    """The trained stretch of a turn cannot be told; it is refused rather than guessed."""


class Span(NamedTuple):
    """Characters [start, end) of the render that message number `message` trains."""

    message: int
    start: int
    end: int


class SpanRules(msgspec.Struct, frozen=True, kw_only=True):
    """What probes taught about a template."""

    prompts: tuple[str, ...]
    """Generation prompts, longest first."""
    headers: tuple[str, ...]
    """Common beginnings of prompts and turns, longest first."""
    control_texts: tuple[str, ...]
    """Texts of the tokenizer's control tokens, longest first."""
    end_of_turn: str | None
    tagged: bool
    """The template has `{% generation %}` tags."""


def assistant_stretches(traced: Traced, roles: Sequence[str]) -> list[Stretch]:
    """The one printed stretch of every assistant message, in order. Raises MaskUnsure where there is not just one."""
    found: dict[int, Stretch] = {}
    for stretch in traced.stretches:
        if roles[stretch.message] != "assistant" or stretch.start == stretch.end:
            continue
        if stretch.message in found:
            raise MaskUnsure(f"the template prints message {stretch.message} in two places")
        found[stretch.message] = stretch
    missing = [number for number, role in enumerate(roles) if role == "assistant" and number not in found]
    if missing:
        raise MaskUnsure(f"the template does not print message {missing[0]} in a loop over the messages")
    ordered = [found[number] for number in sorted(found)]
    if any(a.end > b.start for a, b in itertools.pairwise(ordered)):
        raise MaskUnsure("the template prints the assistant's turns out of order")
    return ordered


def _start(text: str, stretch: Stretch, rules: SpanRules, prefix: Callable[[int], str | None]) -> int:
    for prompt in rules.prompts:
        if text.startswith(prompt, stretch.start) and stretch.start + len(prompt) <= stretch.end:
            return stretch.start + len(prompt)
    before = prefix(stretch.message)
    if before is not None and stretch.start <= len(before) <= stretch.end and text.startswith(before):
        return len(before)
    for header in rules.headers:
        if text.startswith(header, stretch.start):
            return stretch.start + len(header)
    opening = text[stretch.start : stretch.start + 60]
    raise MaskUnsure(f"cannot tell where the reply of message {stretch.message} begins in {opening!r}")


def _tagged_spans(traced: Traced, stretches: Sequence[Stretch], rules: SpanRules) -> list[Span]:
    spans = []
    for start, end in traced.generations:
        owner = next((s.message for s in stretches if s.start <= start and end <= s.end), None)
        if owner is None:
            # An EOS after the whole conversation, behind the turn's own end, is never trained.
            if traced.text[start:end].strip() in (*rules.control_texts, ""):
                continue
            raise MaskUnsure("a {% generation %} block lies outside the assistant's turns")
        spans.append(Span(owner, start, _end(traced.text, start, end)))
    return spans


def _end(text: str, start: int, end: int) -> int:
    return start + len(text[start:end].rstrip())


def find_spans(
    traced: Traced, roles: Sequence[str], rules: SpanRules, prefix: Callable[[int], str | None]
) -> list[Span]:
    """The trained span of every assistant message.

    prefix: renders the messages before number n with the generation prompt, or gives None where the
    template refuses that. Raises MaskUnsure.
    """
    stretches = assistant_stretches(traced, roles)
    if rules.tagged:
        spans = _tagged_spans(traced, stretches, rules)
    else:
        spans = []
        for stretch in stretches:
            start = _start(traced.text, stretch, rules, prefix)
            spans.append(Span(stretch.message, start, max(start, _end(traced.text, start, stretch.end))))
    if rules.end_of_turn is not None:
        for span in spans:
            if traced.text.endswith(rules.end_of_turn, span.start, span.end):
                continue
            if not traced.text.endswith(rules.control_texts, span.start, span.end):
                tail = traced.text[max(span.start, span.end - 40) : span.end]
                raise MaskUnsure(
                    f"message {span.message} does not end in a control token as other turns do ({rules.end_of_turn}), "
                    f"but in {tail!r}"
                )
    return spans


def common_header(prompt: str, turn: str) -> str:
    """What `prompt` and `turn` begin with alike, never cut inside a `<tag>`.

    `<|im_start|>assistant\\n<think>\\n` and `<|im_start|>assistant\\nYes` share `<|im_start|>assistant\\n`.
    """
    length = 0
    while length < min(len(prompt), len(turn)) and prompt[length] == turn[length]:
        length += 1
    header = prompt[:length]
    opened = header.rfind("<")
    if opened >= 0 and ">" not in header[opened:]:
        header = header[:opened]
    return header
