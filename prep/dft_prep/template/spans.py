"""Where the trained stretch of each assistant turn begins and ends in a traced render.

Called by `render`, and by `learnt` for a template's probes. The rule: a label is live exactly where the
model would have generated that token, from the end of what inference feeds it (the generation prompt after the
messages before it) to the token that ends its turn. docs/masks.md has a picture of each case.

A turn begins, by the first of these that holds:

1. after the generation prompt, where the template prints the same one after every conversation and the
   turn's stretch opens with it;
2. where the render of the messages before it, with the generation prompt, ends;
3. the same seen from the end of the turn before it, where earlier text was rendered otherwise;
4. after the learnt header: what generation prompt and turns have in common (templates whose prompt opens
   `<think>` although earlier turns are printed without it);
5. where the turn before it ends, if the template opens no new turn (a reply after a tool's result).

It ends where its stretch ends, without white space to its right, or with the token that follows at once where
that is what ends turns. Templates that mark their replies with `{% generation %}` are taken at their word.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import msgspec

from dft_prep.template.trace import Stretch, Traced


class MaskUnsure(Exception):
    """The trained stretch of a turn cannot be told; it is refused rather than guessed."""


class Span(NamedTuple):
    """Characters [start, end) of the render that message number `message` trains."""

    message: int
    start: int
    end: int


class Header(NamedTuple):
    """What generation prompt and turns begin with alike."""

    text: str
    then_space: bool
    """The prompt goes on with white space alone, so that white space is not for the model to generate."""


class SpanRules(msgspec.Struct, frozen=True, kw_only=True):
    """What probes taught about a template."""

    prompt: str | None
    """The generation prompt, where it is the same after every conversation."""
    headers: tuple[Header, ...]
    """Longest first."""
    control_texts: tuple[str, ...]
    """Texts of the tokenizer's control tokens, longest first."""
    closers: tuple[str, ...]
    """Control tokens that end turns although they are printed outside their stretches."""
    ends: tuple[str, ...]
    """Both: what a trained text ends in that teaches to stop."""
    ends_turns: bool
    """Turns end in a control token, so that each has to; but the last, of which `ends_last` tells."""
    ends_last: bool
    results_in_reply: bool
    """A tool's result is printed inside the turn that called it."""
    tagged: bool
    """The template has `{% generation %}` tags."""


class Prefixes(Protocol):
    """Other renders of the conversation whose spans are wanted."""

    def before(self, number: int) -> Traced | None:
        """What inference is fed for message `number`: the messages before it, with the generation prompt.

        None where the template refuses that.
        """
        ...

    def through(self, number: int) -> str | None:
        """The messages up to and with `number`, as if it were the last. None where the template refuses that."""
        ...

    def content(self, number: int) -> str:
        """The text of message `number`."""
        ...


def _stretches(traced: Traced, roles: Sequence[str]) -> dict[int, Stretch]:
    """The one printed stretch of every assistant message that has one. Stretches that touch are one."""
    found: dict[int, Stretch] = {}
    repeated: set[int] = set()
    for stretch in traced.stretches:
        message, start, end, _ = stretch
        if roles[message] != "assistant" or start == end:
            continue
        known = found.get(message)
        if known is None:
            found[message] = stretch
        elif known.end == start:
            found[message] = known._replace(end=end)
        else:
            repeated.add(message)
    return {message: stretch for message, stretch in found.items() if message not in repeated}


def assistant_texts(traced: Traced, roles: Sequence[str]) -> list[str]:
    """What is printed in the stretches of the assistant's messages."""
    return [traced.text[stretch.start : stretch.end] for stretch in _stretches(traced, roles).values()]


def _start(traced: Traced, stretch: Stretch, rules: SpanRules, prefixes: Prefixes) -> int:
    text, (message, first, last, _) = traced.text, stretch
    if rules.prompt is not None and text.startswith(rules.prompt, first) and first + len(rules.prompt) <= last:
        return first + len(rules.prompt)
    before = prefixes.before(message)
    if before is not None:
        given = len(before.text)
        # White space that ends the turn before may stand between what inference is fed and this stretch.
        if given <= last and text.startswith(before.text) and not text[given:first].strip():
            return given
        start = _start_after_neighbour(traced, before, message)
        if start is not None and first <= start <= last:
            return start
    for header, then_space in rules.headers:
        if text.startswith(header, first):
            start = first + len(header)
            return start + (_spaces(text, start, last) if then_space else 0)
    content = prefixes.content(message)
    start = _start_without_header(traced, before, message, content) if before is not None else None
    if start is not None and first <= start <= last:
        return start
    raise MaskUnsure(f"cannot tell where the reply of message {message} begins in {text[first : first + 60]!r}")


class _Neighbour(NamedTuple):
    """The last turn before a message that prints anything: where, in what inference is fed, and in the whole."""

    there: Stretch
    here: Stretch


def _neighbour(traced: Traced, before: Traced, message: int) -> _Neighbour | None:
    for number in range(message - 1, -1, -1):
        there, here = before.place_of(number), traced.place_of(number)
        if there is not None:
            return _Neighbour(there, here) if here is not None else None
    return None


def _start_after_neighbour(traced: Traced, before: Traced, message: int) -> int | None:
    """Where the prompt ends, counted from the turn before it, which both renders print.

    The turn and the prompt are the same in both, or differ in white space alone; or only the prompt is.
    """
    text, prompted = traced.text, before.text
    neighbour = _neighbour(traced, before, message)
    if neighbour is None:
        shared = shared_beginning(prompted, text).rstrip()
        return _skip(text, len(shared), prompted[len(shared) :])
    there, here = neighbour
    tail = prompted[there.start :]
    if text.startswith(tail, here.start):
        return here.start + len(tail)
    tail = prompted[there.end :]
    if tail.strip() and text.startswith(tail, here.end):
        return here.end + len(tail)
    start = _skip(text, here.start, prompted[there.start :])
    if start is None and _end_alike(text[here.start : here.end], prompted[there.start : there.end]):
        start = _skip(text, here.end, tail) if tail else here.end
    return start


def _end_alike(turn: str, prompted: str) -> bool:
    """Whether a turn that is rendered in two ways ends in the same text in both, and neither goes on."""
    turn, prompted = turn.rstrip(), prompted.rstrip()
    return turn[-1:] == prompted[-1:] and not prompted.startswith(turn)


def _start_without_header(traced: Traced, before: Traced, message: int, content: str) -> int | None:
    """Where a reply goes on with the turn before it (after a tool's result, say) although a prompt would open one.

    Only where the reply's own text stands there: anything else might be a header.
    """
    neighbour = _neighbour(traced, before, message)
    if neighbour is None or not content.strip():
        return None
    there, here = neighbour
    tail, rest = before.text[there.end :], traced.text[here.end :]
    start = here.end + len(common_header(tail, rest).text)
    return start if traced.text[start:].lstrip().startswith(content.strip()) else None


def _skip(text: str, start: int, prompt: str) -> int | None:
    """Where `prompt`, found at `start` of `text` but for its white space, ends."""
    found = re.compile(r"\s*".join(map(re.escape, ["", *prompt.split()]))).match(text, start)
    if found is None:
        return None
    space = prompt[len(prompt.rstrip()) :]
    end = found.end()
    return end + (len(space) if text.startswith(space, end) else _spaces(text, end, len(text)))


def _spaces(text: str, start: int, end: int) -> int:
    return len(text[start:end]) - len(text[start:end].lstrip())


def _end(traced: Traced, start: int, stretch: Stretch, rules: SpanRules) -> int:
    text = traced.text
    end = start + len(text[start : stretch.end].rstrip())
    if text.endswith(rules.control_texts, start, end):
        return end
    for closer in rules.closers:
        at = end + _spaces(text, end, len(text))
        if not text.endswith(closer, start, end) and text.startswith(closer, at):
            return at + len(closer)
    return end


def _end_before_result(traced: Traced, span: Span, prefixes: Prefixes) -> Span:
    """The span without a tool's result: up to where it differs from the same turn before the tool answered."""
    through = prefixes.through(span.message)
    if through is None or not through.startswith(traced.text[: span.start]):
        raise MaskUnsure("the template prints a tool's result inside the assistant's turn, where it would be trained")
    shared = _shared_part(through, traced.text, span.start)
    return span._replace(end=min(span.end, span.start + len(shared.rstrip())))


def _shared_part(through: str, text: str, start: int) -> str:
    """What the two have in common from `start` on: all that `through` has, or what ends outside a `<tag>`."""
    shared = through[start : common_length(through, text)]
    return shared if start + len(shared) == len(through) else without_open_tag(shared)


def _untraced_span(text: str, number: int, rules: SpanRules, prefixes: Prefixes) -> Span:
    """The span by its definition, from the renders of the messages before it and up to it."""
    before, through = prefixes.before(number), prefixes.through(number)
    start = _untraced_start(text, before.text, prefixes.content(number)) if before is not None else None
    if start is None or through is None or not through.startswith(text[:start]):
        raise MaskUnsure(f"the template does not print message {number} in a loop over the messages, and rewrites it")
    end = start + len(_shared_part(through, text, start).rstrip())
    # What ends the whole conversation stands behind the turn's own end.
    for closer in rules.closers:
        inner = text[start : end - len(closer)].rstrip()
        if text.endswith(closer, start, end) and inner.endswith(rules.control_texts):
            end = start + len(inner)
    return Span(number, start, end)


def _untraced_start(text: str, prompted: str, content: str) -> int | None:
    if text.startswith(prompted):
        return len(prompted)
    # A prompt that opens more than the turn has (`<think>`): the reply's own text has to follow what they share.
    start = len(shared_beginning(prompted, text))
    content = content.strip()
    return start if content and text[start:].lstrip().startswith(content) else None


def _tagged_spans(traced: Traced, stretches: Iterable[Stretch], rules: SpanRules) -> list[Span]:
    spans = []
    stretches = list(stretches)
    for start, end in traced.generations:
        owner = next((s.message for s in stretches if s.start <= start and end <= s.end), None)
        if owner is None:
            # An EOS after the whole conversation, behind the turn's own end, is never trained.
            if traced.text[start:end].strip() in (*rules.control_texts, ""):
                continue
            raise MaskUnsure("a {% generation %} block lies outside the assistant's turns")
        spans.append(Span(owner, start, start + len(traced.text[start:end].rstrip())))
    return spans


def find_spans(traced: Traced, roles: Sequence[str], rules: SpanRules, prefixes: Prefixes) -> list[Span]:
    """The trained span of every assistant message, in order. Raises MaskUnsure."""
    stretches = _stretches(traced, roles)
    if rules.tagged:
        return _tagged_spans(traced, stretches.values(), rules)
    spans = []
    for number, role in enumerate(roles):
        if role != "assistant":
            continue
        stretch = stretches.get(number)
        if stretch is None:
            try:
                span = _untraced_span(traced.text, number, rules, prefixes)
            except MaskUnsure:
                if prefixes.content(number).strip():
                    raise
                continue  # an empty reply of which the template prints nothing
        else:
            start = _start(traced, stretch, rules, prefixes)
            span = Span(number, start, max(start, _end(traced, start, stretch, rules)))
        if rules.results_in_reply and number + 1 < len(roles) and roles[number + 1] == "tool":
            span = _end_before_result(traced, span, prefixes)
        spans.append(span)
    if any(a.end > b.start for a, b in itertools.pairwise(spans)):
        raise MaskUnsure("the template prints the assistant's turns out of order")
    _check_ends(traced, spans, rules, len(roles) - 1, prefixes)
    return spans


def _check_ends(traced: Traced, spans: Sequence[Span], rules: SpanRules, last: int, prefixes: Prefixes) -> None:
    """Every span ends in a control token where turns do, but where the template itself ends one otherwise."""
    for span in spans:
        wanted = rules.ends_last if span.message == last else rules.ends_turns
        if not wanted or traced.text.endswith(rules.ends, span.start, span.end):
            continue
        text = traced.text[span.start : span.end]
        through = prefixes.through(span.message)
        if through is None or not through.startswith(traced.text[: span.end]) or through[span.end :].strip():
            raise MaskUnsure(
                f"message {span.message} does not end in a control token as other turns do, but in {text[-40:]!r}"
            )


def ends_in_token(text: str, rules: SpanRules) -> bool:
    """Whether a trained text teaches to stop."""
    return text.endswith(rules.ends)


def is_rewritten(traced: Traced, span: Span, rules: SpanRules, prefixes: Prefixes) -> bool:
    """Whether the turn was rendered otherwise when it was the last: what is trained is not what was generated."""
    before, through = prefixes.before(span.message), prefixes.through(span.message)
    if before is None or through is None:
        return False
    given = shared_beginning(before.text, through)
    generated, trained = through[len(given) :].lstrip(), traced.text[span.start : span.end].lstrip()
    if not generated.startswith(trained):
        # Or it got an end that the last turn does not get.
        return not trained.startswith(generated.rstrip()) or not only_ends(trained[len(generated.rstrip()) :], rules)
    return not only_ends(generated[len(trained) :], rules)


def only_ends(text: str, rules: SpanRules) -> bool:
    """Nothing but white space and control tokens."""
    text = text.strip()
    while text:
        token = next((t for t in rules.ends if text.startswith(t)), None)
        if token is None:
            return False
        text = text[len(token) :].strip()
    return True


def common_length(first: str, second: str) -> int:
    """How many characters the two begin with alike."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first.startswith(second[:middle]):
            low = middle
        else:
            high = middle - 1
    return low


def without_open_tag(text: str) -> str:
    """`text`, cut before a `<tag` at its end that does not close.

    `<|im_start|>assistant\\n<think>\\n` and `<|im_start|>assistant\\n<b>` share `<|im_start|>assistant\\n`.
    """
    opened = text.rfind("<")
    return text[:opened] if opened >= 0 and ">" not in text[opened:] else text


def shared_beginning(first: str, second: str) -> str:
    """What the two begin with alike, never cut inside a `<tag>`."""
    return without_open_tag(first[: common_length(first, second)])


def common_header(prompt: str, turn: str) -> Header:
    """What `prompt` and `turn` begin with alike, never cut inside a `<tag>`."""
    header = shared_beginning(prompt, turn)
    rest = prompt[len(header) :]
    return Header(header, bool(rest) and not rest.strip())
