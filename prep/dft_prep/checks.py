"""The self-checks at every build's start, on probes and on a sample of the real data.

Called by `build` and `preview` before any work. Each conversation is rendered with marks and without, which
must give the same text; the ids of every prompt, piece by piece, must be those of the whole prompt
through `tokenizers`; and each trained span must begin where the prompt for that turn ends. A failure stops
the build: a wrong mask would be silent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from dft_common.errors import DataError
from dft_common.records import Conversation, Message
from dft_prep.encode import BatchEncoder
from dft_prep.render import Rendered, Renderer, RenderRefusal

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


def prompts_of(renderer: Renderer, conversation: Conversation) -> list[str]:
    """What inference would feed before each trained turn, where that is how the whole render begins."""
    messages, tools, _ = renderer.prepare(conversation, Counter())
    prompts = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and conversation.messages[number].weight > 0:
            prompt = renderer.prefix(messages, tools, number)
            if prompt is not None:
                prompts.append(prompt)
    return prompts


def pieces_differ(renderer: Renderer, encoder: BatchEncoder) -> bool:
    """Whether this tokenizer gives a prompt's pieces other ids than the whole prompt."""
    for conversation in probe_conversations():
        try:
            rendered = renderer.render(conversation)
        except RenderRefusal:
            continue
        for start, _, _ in rendered.spans:
            if encoder.prompt_ids(rendered, start) != encoder.reference.encode_prompt(rendered.text[:start]):
                return True
    return False


def _fail(what: str, conversation: Conversation, ours: str, theirs: str) -> DataError:
    first = (conversation.messages[0].content or "")[:80]
    return DataError(
        f"self-check failed: {what}\n"
        f"  conversation that begins: {first!r}\n"
        f"  ours:     {ours!r}\n"
        f"  expected: {theirs!r}",
        remedy=_REMEDY,
    )


def _check_render(renderer: Renderer, conversation: Conversation, rendered: Rendered) -> None:
    messages, tools, _ = renderer.prepare(conversation, Counter())
    plain = renderer.template.render(messages, tools)
    if plain != rendered.text:
        at = next((i for i, (a, b) in enumerate(zip(plain, rendered.text, strict=False)) if a != b), len(plain))
        near = slice(max(0, at - 40), at + 40)
        raise _fail("the traced render differs from the plain one", conversation, rendered.text[near], plain[near])


def check_conversation(renderer: Renderer, encoder: BatchEncoder, conversation: Conversation) -> Counter[str]:
    """Check one conversation; count what was compared. Raises DataError, or RenderRefusal for one that is left out."""
    rendered = renderer.render(conversation)
    done: Counter[str] = Counter(conversations=1)
    _check_render(renderer, conversation, rendered)
    starts = {span.start for span in rendered.spans}
    for prompt in prompts_of(renderer, conversation):
        if not rendered.text.startswith(prompt):
            done["prompts_rewritten"] += 1
            continue
        inside = [span for span in rendered.spans if span.start < len(prompt) < span.end]
        if inside and not renderer.rules.tagged:
            text = rendered.text[inside[0].start : len(prompt)]
            raise _fail("a trained span begins inside what the prompt gives", conversation, text, "")
        if len(prompt) not in starts or rendered.has_stand_ins or encoder.whole:
            continue
        ours, whole = encoder.prompt_ids(rendered, len(prompt)), encoder.reference.encode_prompt(prompt)
        if ours != whole:
            raise _fail("a prompt's ids differ from inference's", conversation, str(ours[-12:]), str(whole[-12:]))
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
