"""Templates put together at random, conversations too: what is trained is what inference would have generated.

The oracle is the definition, by Jinja alone: the render up to a turn, minus the render before it with the generation
prompt. It holds wherever that difference exists and the whole render agrees with it.
"""

from __future__ import annotations

import datetime
import functools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from dft_common.records import Conversation, Message
from dft_prep.template.render import Renderer, RenderRefusal
from dft_prep.tokenizer_files import TokenizerFiles

chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")

DATE = datetime.date(2026, 1, 31)
NAMED = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
ENDS = re.compile("|".join(re.escape(token) for token in tiny.CONTROL))
TRAILING = re.compile(rf"(?:\s|{ENDS.pattern})*\Z")

# How a template goes over the messages: BODY is what it does with one, `m`.
LOOPS = {
    "plain": "{% for m in messages %}BODY{% endfor %}",
    "slice": "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "<|system|>{{ messages[0].content }}<|end|>{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}BODY{% endfor %}",
    "filtered": "{% for m in messages if m.role != 'system' %}BODY{% endfor %}",
    "rebuilt": "{% set ns = namespace(l=[]) %}{% for m in messages %}{% set ns.l = ns.l + [m] %}{% endfor %}"
    "{% for m in ns.l %}BODY{% endfor %}",
    "copied": "{% set ns = namespace(l=[]) %}{% for m in messages %}"
    "{% set ns.l = ns.l + [{'role': m.role, 'content': m.content, 'reasoning_content': m.reasoning_content}] %}"
    "{% endfor %}{% for m in ns.l %}BODY{% endfor %}",
    "numbers": "{% for i in range(messages | length) %}{% set m = messages[i] %}BODY{% endfor %}",
    "enumerated": "{% for k, m in dict(a=messages).items() %}{% for m in m %}BODY{% endfor %}{% endfor %}",
    "history and last": "{% for m in messages[:-1] %}BODY{% endfor %}{% for m in messages[-1:] %}BODY{% endfor %}",
    "twice": "{% for m in messages %}{% if m.role == 'tool' %}x{% endif %}{% endfor %}"
    "{% for m in messages %}BODY{% endfor %}",
    "macro": "{% macro show(m) %}BODY{% endmacro %}{% for m in messages %}{{ show(m) }}{% endfor %}",
    "macro over all": "{% macro all(list) %}{% for m in list %}BODY{% endfor %}{% endmacro %}{{ all(messages) }}",
    "call": "{% macro wrap() %}{{ caller() }}{% endmacro %}"
    "{% call wrap() %}{% for m in messages %}BODY{% endfor %}{% endcall %}",
    "set block": "{% set all %}{% for m in messages %}BODY{% endfor %}{% endset %}{{ all | trim }}",
    "set block, sliced": "{% set all %}..{% for m in messages %}BODY{% endfor %}{% endset %}{{ all[1:] }}",
    "filter block": "{% filter trim %}{% for m in messages %}BODY{% endfor %}{% endfilter %}",
    "lost": "{% set all %}{% for m in messages %}BODY{% endfor %}{% endset %}{{ all | replace('\\0', '') }}",
    "string": "{% set ns = namespace(t='') %}{% for m in messages %}{% set piece %}BODY{% endset %}"
    "{% set ns.t = ns.t ~ piece %}{% endfor %}{{ ns.t }}",
    "two columns": "{% for m in messages %}BODY"
    "{% for n in messages %}{% if n == m %}{% endif %}{% endfor %}{% endfor %}",
}
HEADERS = {
    "chatml": ("<|im_start|>{{ m.role }}\n", "<|im_start|>assistant\n"),
    "words": ("{{ m.role | upper }}: ", "ASSISTANT: "),
    "tags": ("<|{{ m.role }}|>", "<|assistant|>"),
    "bare": ("{% if m.role == 'user' %}[INST] {% endif %}", ""),
}
CONTENTS = {
    "as it is": "{{ m.content }}",
    "trimmed": "{{ m.content | trim }}",
    "stripped": "{{ m.content.strip() }}",
    "in a block": "{% set c %}{{ m.content }}{% endset %}{{ c }}",
    "spaced": "{{ ' ' ~ m.content ~ ' ' }}",
    "added": "{{ ' ' + m.content }}",
}
ENDINGS = {
    "always": "<|im_end|>\n",
    "eos": "{{ eos_token }}",
    "reply only": "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}",
    "none": "\n",
    "bare user": "{% if m.role == 'user' %} [/INST]{% else %}{{ eos_token }}{% endif %}",
}
REASONINGS = {
    "none": "",
    "always": "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}",
    "last": "{% if m is sameas messages[-1] and m.reasoning_content %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}",
    "empty block": "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}",
}
PROMPTS = ("", "<think>\n", "<think>\n\n</think>\n\n")
FINALS = (
    "",
    "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
    "{% if not add_generation_prompt %}<|endoftext|>{% endif %}",
)


@st.composite
def templates(draw) -> str:
    header, prompt = draw(st.sampled_from(sorted(HEADERS.values())))
    ending = draw(st.sampled_from(sorted(ENDINGS.values())))
    body = (
        header + draw(st.sampled_from(sorted(REASONINGS.values()))) + draw(st.sampled_from(sorted(CONTENTS.values())))
    )
    source = draw(st.sampled_from(sorted(LOOPS.values()))).replace("BODY", body + ending)
    prompt += draw(st.sampled_from(PROMPTS)) if prompt else ""
    asked = draw(
        st.sampled_from(("add_generation_prompt", "add_generation_prompt and messages[-1].role != 'assistant'"))
    )
    given_prompt = f"{{% if {asked} %}}{prompt}{{% endif %}}" if prompt else ""
    return draw(st.sampled_from(("", "{{ bos_token }}"))) + source + given_prompt + draw(st.sampled_from(FINALS))


TEXT = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",)), max_size=12),
    st.sampled_from(
        [
            *tiny.CONTROL,
            "<think>",
            "</think>",
            "<think>\n",
            "{{ messages }}",
            "{% endfor %}",
            "<|im_start|>assistant\nfake<|im_end|>\n",
            "ASSISTANT: ",
            "[/INST]",
            "\U000f0000\U000f0001",
            "\uf8f00B1\uf8f1",
            " \n",
            "assistant\n",
        ]
    ),
)
CONTENT = st.lists(TEXT, min_size=1, max_size=3).map("".join)


@st.composite
def conversations(draw) -> Conversation:
    messages = [Message(role="system", content=draw(CONTENT))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message(role="user", content=draw(CONTENT)))
        reasoning = draw(st.one_of(st.none(), st.none(), CONTENT))
        messages.append(Message(role="assistant", content=draw(CONTENT), reasoning=reasoning))
    return Conversation(messages=tuple(messages))


def plain(source: str, messages: list[dict], *, prompt: bool = False) -> str:
    rendered, _ = chat_template_utils.render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=prompt, **NAMED
    )
    return rendered[0]


def for_template(conversation: Conversation) -> list[dict]:
    messages = []
    for message in conversation.messages:
        item = {"role": message.role, "content": message.content}
        if message.reasoning is not None:
            item |= dict.fromkeys(("reasoning_content", "reasoning", "thinking"), message.reasoning)
        messages.append(item)
    return messages


def expected(source: str, messages: list[dict], number: int) -> str | None:
    """What inference would have generated for message `number`; None where that does not exist, or is rewritten."""
    before, through = plain(source, messages[:number], prompt=True), plain(source, messages[: number + 1])
    if not through.startswith(before):
        return None
    generated = through[len(before) :]
    is_last = number == len(messages) - 1
    whole = plain(source, messages)
    return generated if is_last or whole.startswith(before + TRAILING.sub("", generated)) else None


def agrees(trained: str, generated: str) -> bool:
    """The same but for what stands behind the end of the turn: white space, and a conversation's own end."""
    if generated.startswith(trained) and TRAILING.fullmatch(generated[len(trained) :]):
        return trained == trained.rstrip() or not generated[len(trained) :].strip()
    # An end that the template gives a turn only when another one follows.
    return trained.startswith(generated.rstrip()) and bool(ENDS.fullmatch(trained[len(generated.rstrip()) :].strip()))


@functools.cache
def tokenizer() -> TokenizerFiles:
    config = {**NAMED, "tokenizer_class": "PreTrainedTokenizerFast"}
    json = tiny.byte_tokenizer().to_str()
    return TokenizerFiles(origin="tiny", tokenizer_json=json, config=config, chat_template=None, side_files={})


@settings(max_examples=150)
@given(source=templates(), conversation=conversations())
def test_what_is_trained_is_what_inference_would_have_generated(source, conversation):
    renderer = Renderer(source, tokenizer(), DATE)
    messages = for_template(conversation)
    try:
        rendered = renderer.render(conversation)
    except RenderRefusal as refusal:
        wanted = [expected(source, messages, n) for n, m in enumerate(messages) if m["role"] == "assistant"]
        if refusal.code == "nothing_to_train":
            assert not "".join(text or "" for text in wanted).strip()
        else:  # refused rather than guessed: only where some turn has no exact answer
            assert refusal.code == "mask_unsure" and None in wanted, (source, refusal.message)
        return
    assert rendered.restore(rendered.text) == plain(source, messages)
    texts = {
        number: rendered.restore(rendered.text[span.start : span.end])
        for span, number in zip(rendered.spans, rendered.turns, strict=True)
    }
    for number, message in enumerate(messages):
        wanted = expected(source, messages, number) if message["role"] == "assistant" else None
        if wanted is not None:
            assert agrees(texts.get(number, ""), wanted), (source, texts.get(number), wanted)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("header", ["chatml", "words"])
def test_every_way_to_loop_is_compared(loop, header):
    """So that the property above is not passed by refusing: each loop, with a plain body, trains every reply."""
    opening, prompt = HEADERS[header]
    source = LOOPS[loop].replace("BODY", f"{opening}{{{{ m.content }}}}<|im_end|>\n")
    source += f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    conversation = Conversation(
        messages=tuple(Message(role=m["role"], content=m["content"]) for m in tiny.turns("a", "b", "c", "d"))
    )
    rendered = Renderer(source, tokenizer(), DATE).render(conversation)
    texts = [rendered.text[span.start : span.end] for span in rendered.spans]
    assert texts == ["b<|im_end|>", "d<|im_end|>"]
