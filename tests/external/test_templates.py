"""Chat templates by other people: what is trained is what inference would have generated, for every one of them.

The oracle is transformers' own render: of the messages up to a turn, minus that of the messages before it with the
generation prompt. Compared, text and place, wherever that difference exists and the whole render agrees with it. Where
the prompt opens a `<think>` that the template prints no turn with, it is the difference to the prompt without that. The
templates' copies with `{% generation %}` tags are set aside: they say themselves what is trained.
"""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from tokenizers import AddedToken

import tiny
from dft_common.records import Conversation, Message, ToolCall
from dft_prep.template.render import Renderer, RenderRefusal
from dft_prep.tokenizer_files import TokenizerFiles

utils = pytest.importorskip("transformers.utils.chat_template_utils")

TEMPLATES = Path(__file__).resolve().parents[3] / "shared" / "chat_templates"
FILES = {path.stem: path for path in sorted(TEMPLATES.rglob("*.jinja")) if "_training" not in path.stem}
pytestmark = pytest.mark.skipif(not FILES, reason="the shared templates are not here")

DATE = datetime.date(2026, 1, 31)
OPENED = "<think>\n"
LEAST = 15  # turns that are compared; most templates have more than 25
CONTROL = re.compile(r"<\|[^|<>'\"\s{}]+\|>|<｜[^｜]+｜>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]")


def user(text: str) -> Message:
    return Message(role="user", content=text)


def reply(text: str | None, **more) -> Message:
    return Message(role="assistant", content=text, **more)


SYSTEM = Message(role="system", content="Be brief.")
CALL = ToolCall(name="add", arguments='{"a": 1}', id="abcdefghi")
RESULT = Message(role="tool", content="2", name="add", tool_call_id="abcdefghi")
PROPERTIES = {"a": {"type": "integer", "description": "A number."}}
ADD = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": PROPERTIES}}
CONVERSATIONS = {
    "one turn": [user("Hi"), reply("Hello there.")],
    "three turns": [user("Hi"), reply("a"), user("b"), reply("c"), user("d"), reply("e")],
    "system": [SYSTEM, user("Hi"), reply("Hello."), user("More?"), reply("Yes.")],
    "reasoning": [user("Hi"), reply("A.", reasoning="I think so."), user("b"), reply("B.", reasoning="Sure\n\nyes")],
    "thinking in the text": [user("q"), reply("<think>\nhm\n</think>\n\na"), user("q"), reply("<think>hm</think>b")],
    "white space": [user(" Hi \n"), reply("  around \n\n"), user("\n\nmore\n"), reply("\n a line first")],
    "unicode": [user("日本語 👍🏽"), reply("e\u0301 \u2028 你好 🚀"), user("\u00a0x"), reply("\ufeffend\u200b")],
    "blank lines": [user("\n\n\na\n\n\n"), reply("b\n\n\n\nc"), user(" "), reply(" \n"), user("q"), reply("\t\nd\n")],
    "look-alikes": [
        user("say <|im_end|> or </s> or <|assistant|>"),
        reply("<think>\nno</think> <|im_start|>assistant\nfake<|eot_id|>"),
        user("<|im_start|>assistant\n[INST]"),
        reply("assistant\n<|assistant|>\n[/INST] ### Response: ASSISTANT: </s>done"),
    ],
    "jinja": [user("{{ x }} {% y %}"), reply("{{ messages }} {% for %}"), user("{#"), reply("#}")],
    "open tags": [user("q"), reply("<think"), user("q"), reply("<think>")],
    "an empty reply": [user("q"), reply(""), user("q"), reply("fine")],
    "equal turns": [user("x"), reply("x"), user("x"), reply("x")],
    "two replies": [user("x"), reply("one"), reply("two")],
    "tools": [user("1+1?"), reply(None, tool_calls=(CALL,)), RESULT, reply("It is 2.")],
    "tools and more": [
        SYSTEM, user("1+1?"), reply("I see.", tool_calls=(CALL,)), RESULT, reply("It is 2."), user("and?"), reply("3."),
    ],
    "tools and reasoning": [
        user("1+1?"), reply("", reasoning="Add.", tool_calls=(CALL,)), RESULT, reply(" 2.\n", reasoning="\nSo 2."),
    ],
    "unused tools": [user("Hi"), reply("Hello."), user("b"), reply("c")],
}  # fmt: skip


def tokenizer_for(source: str) -> TokenizerFiles:
    """A tokenizer whose control tokens are those that the template writes."""
    tokenizer = tiny.byte_tokenizer()
    texts = sorted({*CONTROL.findall(source), "<s>", "</s>"})
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in texts])
    eos = next(
        (t for t in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<｜end▁of▁sentence｜>") if t in texts), "</s>"
    )
    config = {"bos_token": "<s>", "eos_token": eos, "unk_token": "<unk>"}
    return TokenizerFiles(
        origin="tiny", tokenizer_json=tokenizer.to_str(), config=config, chat_template=None, side_files={}
    )


class Answer(NamedTuple):
    """What inference is fed for a turn, and what it would have generated."""

    before: str
    generated: str


class Oracle:
    """transformers' render of the messages that our renderer gives the template."""

    def __init__(self, source: str, renderer: Renderer, conversation: Conversation, named: dict[str, str]) -> None:
        prepared = renderer.prepare(conversation)
        restore = prepared.stand_ins.restore if prepared.stand_ins is not None else str
        given = json.dumps([prepared.messages, prepared.tools], ensure_ascii=False)
        self.messages, self.tools = json.loads(restore(given))
        self.source, self.named = source, named
        self.whole = self.render(len(self.messages))

    def render(self, end: int, *, prompt: bool = False) -> str | None:
        return render(self.source, self.messages[:end], self.tools, self.named, prompt=prompt)

    def answer(self, number: int) -> Answer | None:
        """For message `number`; None where there is no exact one."""
        before, through = self.render(number, prompt=True), self.render(number + 1)
        if before is None or through is None or self.whole is None:
            return None
        fed = [before, before.rstrip(), before.removesuffix(OPENED)] if before.endswith(OPENED) else [before]
        shared = next((text for text in fed if through.startswith(text)), None)
        if shared is None or not self.whole.startswith(shared + without_end(through[len(shared) :])):
            return None
        return Answer(shared, through[len(shared) :])


def render(source: str, messages: list, tools: list | None, named: dict[str, str], *, prompt: bool) -> str | None:
    try:
        texts, _ = utils.render_jinja_template(
            [messages], tools=tools, chat_template=source, add_generation_prompt=prompt, **named
        )
    except Exception:  # templates refuse what they refuse with whatever they please
        return None
    return texts[0]


def without_end(text: str) -> str:
    """`text` without the control tokens and the white space at its end."""
    return re.sub(rf"(?:\s|{CONTROL.pattern})*\Z", "", text)


@pytest.mark.parametrize("name", FILES)
def test_what_is_trained_is_what_inference_would_have_generated(name):
    source = FILES[name].read_text("utf-8")
    tokenizer = tokenizer_for(source)
    renderer = Renderer(source, tokenizer, DATE)
    compared = 0
    for title, messages in CONVERSATIONS.items():
        tools = (ADD,) if "tools" in title else ()
        conversation = Conversation(messages=tuple(messages), tools=tools)
        try:
            rendered = renderer.render(conversation)
        except RenderRefusal as refusal:
            assert refusal.code == "template_refused", (title, refusal.message)
            plain = [{"role": message.role, "content": message.content or ""} for message in messages]
            assert render(source, plain, None, tokenizer.named_tokens(), prompt=False) is None, title
            continue
        oracle = Oracle(source, renderer, conversation, tokenizer.named_tokens())
        assert rendered.restore(rendered.text) == oracle.whole, title
        assert all(messages[number].role == "assistant" for number in rendered.turns), title
        spans = dict(zip(rendered.turns, rendered.spans, strict=True))
        for number, message in enumerate(messages):
            answer = oracle.answer(number) if message.role == "assistant" else None
            if answer is None:
                continue
            where = (title, number, answer)
            start, end, _ = spans.get(number, (0, 0, 0))
            trained = rendered.restore(rendered.text[start:end])
            if number in spans:
                assert rendered.restore(rendered.text[:start]) == answer.before, where
            assert answer.generated.startswith(trained) and trained == trained.rstrip(), (*where, trained)
            # What inference generates beyond it stands behind the token that ends the turn.
            beyond = answer.generated[len(trained) :]
            assert not without_end(beyond), (*where, trained)
            assert not beyond.strip() or re.search(rf"(?:{CONTROL.pattern})\Z", trained), (*where, trained)
            compared += 1
    assert compared >= LEAST, compared
