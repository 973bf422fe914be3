"""What a template's probes teach: the generation prompt, how a turn opens and ends, whether history is rewritten.

Called once a build, by `render`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from dft_common.errors import SetupError
from dft_prep.template.compiled import ChatTemplate, TemplateRefusal
from dft_prep.template.probes import REPLY, RESULT, TOOLS, Capabilities, Messages, Probe, Prober, make_prober
from dft_prep.template.spans import (
    Header,
    MaskUnsure,
    SpanRules,
    assistant_texts,
    common_header,
    is_rewritten,
)
from dft_prep.template.trace import mark_messages


class Learnt(NamedTuple):
    """What the probes taught."""

    rules: SpanRules
    can: Capabilities
    end_of_turn: str | None
    """The control token that ends a reply, or None."""
    prompts: tuple[str, ...]
    """The generation prompts that were seen, longest first."""
    rewrites: bool
    """It may render an earlier turn otherwise than it rendered it as the last."""


def _prompt_after(template: ChatTemplate, messages: Messages, tools: Any) -> str | None:
    """What `add_generation_prompt` adds after `messages`: with it minus without it, from the last turn on.

    Not the common prefix of the whole renders, which would eat the `<` that `</s>` and `<|assistant|>` share.
    """
    try:
        marked = mark_messages(messages)
        plain, prompted = template.trace(marked, tools), template.trace(marked, tools, prompt=True)
    except TemplateRefusal:
        return None
    last = len(messages) - 1
    places = plain.place_of(last), prompted.place_of(last)
    if places[0] is None or places[1] is None or plain.text[: places[0].end] != prompted.text[: places[1].end]:
        rest = prompted.text.removeprefix(plain.text)
        return rest if rest != prompted.text and rest else None
    without, with_prompt = plain.text[places[0].end :], prompted.text[places[1].end :]
    if with_prompt == without:
        return None
    return with_prompt.removeprefix(without)


def learn(template: ChatTemplate, control_texts: tuple[str, ...], eos_token: str | None) -> Learnt:
    """Everything the probes tell. Raises SetupError where the template prints no plain conversation."""
    prober = make_prober(template)
    can = prober.capabilities()
    probes = list(prober.probes(prober.answered(can.tool_calls)))
    found = {
        prompt
        for messages in prober.prefixes()
        for tools in (None, TOOLS)
        if (prompt := _prompt_after(template, messages, tools))
    }
    prompts = tuple(sorted(found, key=lambda prompt: (-len(prompt), prompt)))
    closers = _closers(probes, control_texts, eos_token)
    rules = SpanRules(
        prompt=prompts[0] if len(prompts) == 1 and template.prompt_is_constant else None,
        headers=_headers(prompts, [*probes, *prober.probes([[prober.user(), prober.reply("")]])]),
        control_texts=control_texts,
        closers=closers,
        ends=(*control_texts, *closers),
        ends_turns=False,
        ends_last=False,
        results_in_reply=any(RESULT in text for probe in probes for text in assistant_texts(probe.traced, probe.roles)),
        tagged=template.has_generation_tags,
    )
    ends = _ends(prober, probes, rules)
    return Learnt(
        rules=msgspec.structs.replace(
            rules,
            ends_turns=bool(ends.within) and all(ends.within),
            ends_last=all(ends.last),
        ),
        can=can,
        end_of_turn=ends.token(),
        prompts=prompts,
        rewrites=_rewrites(probes, rules),
    )


def _headers(prompts: tuple[str, ...], probes: list[Probe]) -> tuple[Header, ...]:
    turns = {turn for probe in probes for turn in assistant_texts(probe.traced, probe.roles)}
    headers = {header for prompt in prompts for turn in turns if (header := common_header(prompt, turn)).text.strip()}
    return tuple(sorted(headers, key=lambda header: (-len(header.text), header)))


def _closers(probes: list[Probe], control_texts: tuple[str, ...], eos_token: str | None) -> tuple[str, ...]:
    """Control tokens that follow at once a reply after which its turn's own stretch prints nothing."""
    tokens = (*control_texts, *((eos_token,) if eos_token else ()))
    closers: set[str] = set()
    for probe in probes:
        text = probe.traced.text
        for message, _, end, _ in probe.traced.stretches:
            if probe.roles[message] != "assistant" or not text[:end].rstrip().endswith(REPLY):
                continue
            after = text[end:].lstrip()
            is_last = message == len(probe.messages) - 1
            closers |= {t for t in tokens if after.startswith(t) and (is_last or t == eos_token)}
    return tuple(sorted(closers, key=lambda token: (-len(token), token)))


class _Ends(NamedTuple):
    """The control token that ends each reply of the probes, or None: of replies within, and at the end."""

    within: list[str | None]
    last: list[str | None]

    def token(self) -> str | None:
        """What ends a reply, rather at a conversation's end."""
        return next((token for token in (*self.last, *self.within) if token is not None), None)


def _ends(prober: Prober, probes: list[Probe], rules: SpanRules) -> _Ends:
    ends = _Ends([], [])
    refusal = "" if probes else _first_refusal(prober)
    for probe in probes:
        try:
            spans = probe.spans(rules)
        except MaskUnsure as error:
            refusal = refusal or str(error)
            continue
        for span in spans:
            text = probe.traced.text[span.start : span.end]
            end = next((token for token in rules.ends if text.endswith(token)), None)
            if span.message < len(probe.messages) - 1:
                ends.within.append(end)
            elif REPLY in text:
                ends.last.append(end)
            else:
                refusal = refusal or "it does not print the reply where inference would have generated it"
    if not ends.last:
        raise SetupError(
            f"the chat template cannot be used: on a plain conversation, {refusal}",
            remedy="give another template with --chat_template FILE.jinja, or `--chat_template chatml`",
        )
    return ends


def _first_refusal(prober: Prober) -> str:
    try:
        prober.template.render([prober.user(), prober.reply()])
    except TemplateRefusal as error:
        return f"it refuses: {error}"
    return "it prints nothing"


def _rewrites(probes: list[Probe], rules: SpanRules) -> bool:
    """Whether some probe's turn is rendered otherwise when it is not the last."""
    for probe in probes:
        try:
            spans = probe.spans(rules)
        except MaskUnsure:
            continue
        if any(is_rewritten(probe.traced, span, rules, probe.prefixes) for span in spans):
            return True
    return False
