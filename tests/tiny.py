"""Small tokenizers, chat templates and corpora that the tests make themselves."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The else branch prints an EOS after the whole conversation, behind the turn's own end.
PHI = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ '<|user|>\n' + message.content + '<|end|>\n' }}"
    "{% elif message.role == 'system' %}{{ '<|system|>\n' + message.content + '<|end|>\n' }}"
    "{% elif message.role == 'assistant' %}{{ '<|assistant|>\n' + message.content + '<|end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# No generation prompt at all: the reply begins where the user's turn ends.
INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}"
    "{% elif message.role == 'assistant' %}{{ ' ' + message.content | trim + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
# Reasoning is printed for the last turn alone, tool calls as objects, tool results merged into a user turn.
THINKING = (
    "{%- if tools %}{{- '<|im_start|>system\n# Tools\n' }}"
    "{%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.last and message.reasoning_content %}"
    "{{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}{%- endif %}"
    "{{- message.content }}"
    "{%- for call in message.tool_calls or [] %}"
    '{{- \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- call.function.arguments | tojson + '}\n</tool_call>' }}"
    "{%- endfor %}{{- '<|im_end|>\n' }}"
    "{%- elif message.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
)
TAGGED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message.content + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "phi": PHI, "instruct": INSTRUCT, "thinking": THINKING, "tagged": TAGGED}

CONTROL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "<|user|>", "<|system|>", "<|assistant|>", "<|end|>")
_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "system user assistant tool",
    "What is the capital of France? Paris is the capital of France.",
    "1 + 1 = 2, 10 + 20 = 30; \"quoted\", 'single'",
)


def byte_tokenizer(*, strips_right: bool = False) -> Tokenizer:
    """A byte-level BPE with every control token of the templates; `strips_right` as Phi-3's tokens do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        _TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True, rstrip=strips_right) for text in CONTROL])
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    return tokenizer


def prefix_space_tokenizer() -> Tokenizer:
    """A SentencePiece-like tokenizer, whose normalizer puts a space before every run of text."""
    tokenizer = byte_tokenizer()
    tokenizer.normalizer = normalizers.Prepend(" ")
    return tokenizer


def write_tokenizer(directory: Path, template: str | None = CHATML, tokenizer: Tokenizer | None = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (tokenizer or byte_tokenizer()).save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, "utf-8")
    return directory


def turns(*contents: str, system: str | None = None) -> list[dict]:
    """Messages whose roles alternate, the user first."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return messages + [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return path


def numbered(count: int, start: int = 0) -> list[dict]:
    """`count` different two-turn conversations of uneven length."""
    return [
        {"messages": turns(f"What is {i} + 1?", f"{i} + 1 = {i + 1}" + " indeed" * (i * 7919 % 23))}
        for i in range(start, start + count)
    ]
