"""The demo's corpus, tokenizer and model: all made here, nothing downloaded. Called by `demo.py`.

The task is one that a tiny model can learn in two minutes: the capital of a country, asked for in two
dozen ways. Held-out prompts ask about a known country in a way in which that country was never asked about.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

CAPITALS = {
    "Austria": "Vienna", "Belgium": "Brussels", "Brazil": "Brasilia", "Canada": "Ottawa", "Chile": "Santiago",
    "Cuba": "Havana", "Denmark": "Copenhagen", "Egypt": "Cairo", "Finland": "Helsinki", "France": "Paris",
    "Germany": "Berlin", "Ghana": "Accra", "Greece": "Athens", "Hungary": "Budapest", "Iceland": "Reykjavik",
    "Ireland": "Dublin", "Italy": "Rome", "Japan": "Tokyo", "Kenya": "Nairobi", "Mexico": "Mexico City",
    "Norway": "Oslo", "Peru": "Lima", "Poland": "Warsaw", "Portugal": "Lisbon", "Senegal": "Dakar",
    "Spain": "Madrid", "Sweden": "Stockholm", "Thailand": "Bangkok", "Turkey": "Ankara", "Vietnam": "Hanoi",
}  # fmt: skip
QUESTIONS = (
    "What is the capital of {}?", "Name the capital of {}.", "Tell me the capital of {}, please.",
    "Which city is the capital of {}?", "The capital of {} is which city?", "Do you know the capital of {}?",
    "I forgot the capital of {}. Help!", "Quick: the capital of {}!", "Capital of {}?",
    "In one sentence: what is the capital of {}?", "For a quiz: the capital of {}?", "{}: what is its capital?",
    "{} has which capital?", "Where is the government of {}?", "Where does the parliament of {} meet?",
    "My child asks for the capital of {}.", "Please name the capital city of {}.", "What city is the capital of {}?",
    "State the capital of {}.", "Could you tell me the capital of {}?", "Say the capital of {}.",
    "Which capital does {} have?", "Hello! What is the capital of {}?", "Give me the capital of {}.",
)  # fmt: skip


def _turns(country: str, question: str) -> tuple[str, str]:
    return question.format(country), f"The capital of {country} is {CAPITALS[country]}."


def _plain(country: str, question: str) -> dict:
    user, reply = _turns(country, question)
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]}


def _sharegpt(country: str, question: str) -> dict:
    user, reply = _turns(country, question)
    return {"conversations": [{"from": "human", "value": user}, {"from": "gpt", "value": reply}]}


def _parts(country: str, question: str, number: int) -> dict:
    user, reply = _turns(country, question)
    content = [{"type": "text", "text": user}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": reply, "weight": 1}]
    meta = number if number % 2 else {"written_by": "demo"}  # a field whose type changes from record to record
    return {"messages": messages, "meta": meta}


def _broken(records: list[dict]) -> bytes:
    """Good records with bad ones between them: each bad one ends in the quarantine with its reason."""
    lines = [json.dumps(record).encode() for record in records]
    lines.insert(3, b'{"messages": [{"role": "user", "content": "No reply here."}]}')
    lines.insert(9, b'{"messages": [{"role": "user", "content": "Hm?"}, {"role": "bot", "content": "Yes."}]}')
    lines.insert(15, b'{"messages": [{"role": "user", "content": "\xff\xfe"}, {"role": "assistant", "content": "?"}]}')
    lines.append(lines[0])  # an exact duplicate
    return b"\n".join(lines) + b'\n{"messages": [{"role": "user", "content": "The file ends in the mid'


def write_corpus(directory: Path) -> list[Path]:
    """Write four files of different shapes and return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    pairs = [(country, question) for country in CAPITALS for question in QUESTIONS]
    random.Random(0).shuffle(pairs)
    quarter = len(pairs) // 4
    plain, sharegpt, parts, mixed = (pairs[start : start + quarter] for start in range(0, 4 * quarter, quarter))
    files = {
        "plain.jsonl": "".join(json.dumps(_plain(*pair)) + "\n" for pair in plain).encode(),
        "sharegpt.json": json.dumps([_sharegpt(*pair) for pair in sharegpt], indent=1).encode(),
        "parts.jsonl": "".join(json.dumps(_parts(*pair, number)) + "\n" for number, pair in enumerate(parts)).encode(),
        "broken.jsonl": _broken([_plain(*pair) for pair in mixed]),
    }
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return [directory / name for name in files]


def write_tokenizer(directory: Path) -> None:
    """Train a byte-level BPE on the task's texts and save it with ChatML's control tokens and template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = [text for country in CAPITALS for question in QUESTIONS for text in _turns(country, question)]
    tokenizer.train_from_iterator([*texts, "system\n user\n assistant\n"], trainer)
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    (directory / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
        " + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "utf-8",
    )


def write_model(directory: Path, vocab_size: int) -> None:
    """Save a small Qwen3-architecture model with random weights."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
