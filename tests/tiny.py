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


BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))


def sentencepiece_tokenizer(
    model: str = "bpe", dummy_space: str = "normalizer", *, strips_right: bool = False, in_model: tuple[str, ...] = ()
) -> Tokenizer:
    """A tokenizer as converted from SentencePiece: `▁` for spaces, bytes for characters that it does not know.

    `model`: "bpe" or "unigram". `dummy_space` puts a space before text: "normalizer" as Llama 2 does, or a Metaspace
    pre-tokenizer, "first" before the whole text alone, "always" after every control token too. `in_model`: texts that
    stand in the model's own vocabulary besides, as T5's control tokens do.
    """
    bpe = model == "bpe"
    learner = Tokenizer(models.BPE() if bpe else models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer if bpe else trainers.UnigramTrainer
    learner.train_from_iterator(_TEXTS, trainer(vocab_size=150, show_progress=False))
    learnt = json.loads(learner.to_str())["model"]
    first = ("<unk>", *in_model, *BYTE_TOKENS)
    if bpe:
        vocabulary = {text: number for number, text in enumerate([*first, *learnt["vocab"], "▁▁"])}
        merges = [*map(tuple, learnt["merges"]), ("▁", "▁")]
        made = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    else:
        pieces = [*((text, 0.0) for text in first), *((text, score) for text, score in learnt["vocab"])]
        made = models.Unigram(pieces, unk_id=0, byte_fallback=True)
    tokenizer = Tokenizer(made)
    if dummy_space == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=dummy_space, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False, rstrip=strips_right) for text in CONTROL]
    )
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
