"""Chat templates by other people: what is trained is what inference would have generated, for every one of them.

The oracle is transformers' own render: of the messages up to a turn, minus that of the messages before it with the
generation prompt. Compared wherever that difference exists and the whole render agrees with it; the templates' copies
with `{% generation %}` tags set aside, which say themselves what is trained.
"""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path

import pytest
from tokenizers import AddedToken

import tiny
from dft_common.records import Conversation, Message, ToolCall
from dft_prep.render import Renderer, RenderRefusal
from dft_prep.tokenizer_files import TokenizerFiles

utils = pytest.importorskip("transformers.utils.chat_template_utils")

TEMPLATES = Path(__file__).resolve().parents[3] / "shared" / "chat_templates"
FILES = {path.stem: path for path in sorted(TEMPLATES.rglob("*.jinja")) if "_training" not in path.stem}
pytestmark = pytest.mark.skipif(not FILES, reason="the shared templates are not here")

DATE = datetime.date(2026, 1, 31)
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


class Oracle:
    """transformers' render of the messages that our renderer gives the template."""

    def __init__(self, source: str, renderer: Renderer, conversation: Conversation, named: dict[str, str]) -> None:
        prepared = renderer.prepare(conversation)
        restore = prepared.stand_ins.restore if prepared.stand_ins is not None else str
        self.messages = [json.loads(restore(json.dumps(message, ensure_ascii=False))) for message in prepared.messages]
        self.tools = prepared.tools
        self.source, self.named = source, named

    def render(self, end: int, *, prompt: bool = False) -> str | None:
        try:
            texts, _ = utils.render_jinja_template(
                [self.messages[:end]],
                tools=self.tools,
                chat_template=self.source,
                add_generation_prompt=prompt,
                **self.named,
            )
        except Exception:  # templates refuse what they refuse with whatever they please
            return None
        return texts[0]

    def generated(self, number: int) -> str | None:
        """What inference would have generated for message `number`, or None where there is no exact answer."""
        before, through = self.render(number, prompt=True), self.render(number + 1)
        whole = self.render(len(self.messages))
        if before is None or through is None or whole is None or not through.startswith(before):
            return None
        generated = through[len(before) :]
        return generated if whole.startswith(before + without_end(generated)) else None


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
            continue
        oracle = Oracle(source, renderer, conversation, tokenizer.named_tokens())
        assert rendered.restore(rendered.text) == oracle.render(len(messages)), title
        texts = {n: rendered.text[s.start : s.end] for s, n in zip(rendered.spans, rendered.turns, strict=True)}
        for number, message in enumerate(messages):
            wanted = oracle.generated(number) if message.role == "assistant" else None
            if wanted is None:
                continue
            trained = rendered.restore(texts.get(number, ""))
            assert wanted.startswith(trained) and trained == trained.rstrip(), (title, number, trained, wanted)
            # What inference generates beyond it stands behind the token that ends the turn.
            assert not without_end(wanted[len(trained) :]), (title, number, trained, wanted)
            if wanted.rstrip() != trained:
                assert CONTROL.search(trained[-40:]), (title, number, trained, wanted)
            compared += 1
    # Where the prompt opens `<think>` and turns are printed without it, few turns have an exact answer.
    assert compared >= (2 if any(prompt.endswith("<think>\n") for prompt in renderer.prompts) else 12), compared
