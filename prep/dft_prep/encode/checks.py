"""The self-checks at every build's start, on probes and on a sample of the real data.

Called by `build` and `preview` before any work. Each conversation is rendered with marks and without, which
must give the same text; the ids of every prompt, piece by piece, must be those of the whole prompt
through `tokenizers`; and each trained span must begin where the prompt for that turn ends. A failure stops
the build: a wrong mask would be silent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from dft_common.errors import DataError, printable
from dft_common.records import Conversation, Message
from dft_prep.encode.batch import BatchEncoder
from dft_prep.template.probes import RenderedPrefixes
from dft_prep.template.render import Prepared, Rendered, Renderer, RenderRefusal, TrainedSpan
from dft_prep.template.spans import Span, common_length, ends_in_token, is_rewritten, only_ends

_REMEDY = "give another template with --chat_template FILE.jinja; what the check found is a bug worth reporting"


def probe_conversations() -> list[Conversation]:
    """Plain conversations with the texts that go wrong: edge white space, empty lines, several turns."""
    texts = [
        "Hello",
        " leading space",
        "trailing space ",
        "two\n\nlines\n",
        "日本語 and emoji 👍🏽",
        "x = 1\n    y = 2",
    ]
    out = []
    for system in (False, True):
        for text in texts:
            turns = [Message(role="system", content=f"Be brief. {text}")] if system else []
            turns += [Message(role="user", content=text), Message(role="assistant", content=f"{text}!")]
            turns += [Message(role="user", content="And?"), Message(role="assistant", content=text)]
            out.append(Conversation(messages=tuple(turns)))
    return out


class _Checked(NamedTuple):
    """A conversation that is being checked."""

    renderer: Renderer
    conversation: Conversation
    prepared: Prepared
    rendered: Rendered

    def fail(self, what: str, ours: str, expected: str, message: int = 0) -> DataError:
        """What the template's author needs to see: its line, the conversation, the two texts one above the other."""
        place = self.prepared.traced.place_of(message)
        lines = [f"self-check failed: {what}"]
        if place is not None and place.line:
            source = self.renderer.template.source.splitlines()[place.line - 1].strip()
            lines.append(f"  template line {place.line}: {source[:100]}")
        turns = [f"{m.role}: {printable((m.content or '')[:60])!r}" for m in self.conversation.messages[: message + 1]]
        lines += [f"  message {number}, {turn}" for number, turn in enumerate(turns)][-4:]
        lines += [f"  ours:     {ours!r}", f"  expected: {expected!r}"]
        return DataError("\n".join(lines), remedy=_REMEDY)


def _check_render(checked: _Checked) -> None:
    plain = checked.renderer.template.render(checked.prepared.messages, checked.prepared.tools)
    for ours in (checked.prepared.traced.text, checked.rendered.text):
        if ours != plain:
            at = common_length(plain, ours)
            near = slice(max(0, at - 40), at + 40)
            raise checked.fail("the traced render differs from the plain one", ours[near], plain[near])


def _check_span(checked: _Checked, span: TrainedSpan, number: int, prefixes: RenderedPrefixes) -> str:
    """Hold a trained span to its definition: what follows the prompt for that turn. What could be compared.

    A definition needs the whole render to begin with that prompt: it does not where history is rewritten.
    """
    rules, text = checked.renderer.rules, checked.rendered.text
    before, through = prefixes.before(number), prefixes.through(number)
    if before is None or not text.startswith(before.text):
        return "prompts_rewritten"
    trained = text[span.start : span.end]
    if rules.tagged:
        return "turns_tagged"
    if span.start != len(before.text):
        raise checked.fail(
            "a trained span does not begin where its prompt ends", trained, text[len(before.text) :][:80]
        )
    if through is None or not through.startswith(before.text):
        return "turns_rewritten"
    generated = through[len(before.text) :]
    if generated.startswith(trained) and (ends_in_token(trained, rules) or only_ends(generated[len(trained) :], rules)):
        return "turns"
    if is_rewritten(checked.prepared.traced, Span(number, span.start, span.end), rules, prefixes):
        return "turns_rewritten"
    if trained.startswith(generated.rstrip()):
        return "turns"  # and the end that the template gives a turn only when another follows
    raise checked.fail("a trained text differs from what inference would have generated", trained, generated, number)


def check_conversation(renderer: Renderer, encoder: BatchEncoder, conversation: Conversation) -> Counter[str]:
    """Check one conversation; count what was compared. Raises DataError, or RenderRefusal for one that is left out."""
    rendered = renderer.render(conversation)
    prepared = renderer.prepare(conversation)
    checked = _Checked(renderer, conversation, prepared, rendered)
    done: Counter[str] = Counter(conversations=1)
    _check_render(checked)
    prefixes = RenderedPrefixes(renderer.template, prepared.messages, prepared.tools)
    for span, number in zip(rendered.spans, rendered.turns, strict=True):
        compared = _check_span(checked, span, number, prefixes)
        done[compared] += 1
        if compared not in ("turns", "turns_rewritten") or rendered.stand_ins is not None:
            continue
        prompt = rendered.text[: span.start]
        ours, whole = encoder.prompt_ids(rendered, span.start), encoder.reference.encode_prompt(prompt)
        if ours != whole:
            raise checked.fail("a prompt's ids differ from inference's", str(ours[-12:]), str(whole[-12:]), number)
        done["prompts"] += 1
    return done


def self_check(renderer: Renderer, encoder: BatchEncoder, sample: Sequence[Conversation]) -> dict[str, Any]:
    """Check the probes and `sample`; what was done, for the manifest."""
    done: Counter[str] = Counter()
    for conversation in [*probe_conversations(), *sample]:
        try:
            done += check_conversation(renderer, encoder, conversation)
        except RenderRefusal:
            done["refused"] += 1
    return dict(sorted(done.items()))
