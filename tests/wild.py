"""Sources in every format of the wild, made from their public descriptions, with replies that are easily damaged."""

from __future__ import annotations

import json
from pathlib import Path

REPLIES = [
    "007",
    "2024-01-01",
    "1e400",
    "a\u2028b\u2029c",
    "surrogate pairs 😀 𝒳",
    " leading and trailing \n",
    "null",
    "\ufeffmark",
    'quotes " and \\ backslashes',
    "tab\tand\r\nbreak",
    "中文，العربية",
    "<|im_end|> in text",
]


def question(form: str, number: int) -> str:
    return f"{form} question {number}"


def messages(q: str, a: str) -> list[dict]:
    return [{"role": "user", "content": q}, {"role": "assistant", "content": a}]


def anthropic(q: str, a: str) -> dict:
    call = {"type": "tool_use", "id": "t1", "name": "look", "input": {"x": 1}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "found"}
    return {
        "system": "be brief",
        "messages": [
            {"role": "user", "content": q},
            {"role": "assistant", "content": [call]},
            {"role": "user", "content": [result]},
            {"role": "assistant", "content": [{"type": "text", "text": a}]},
        ],
    }


def mistral(q: str, a: str) -> dict:
    call = {"id": "VvvODy9mT", "type": "function", "function": {"name": "look", "arguments": '{"x": 1}'}}
    return {
        "messages": [
            {"role": "user", "content": q},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "VvvODy9mT", "content": {"found": True}},
            {"role": "assistant", "content": a},
        ],
        "tools": [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}],
    }


FORMATS = {
    "openai": lambda q, a: {"messages": messages(q, a), "parallel_tool_calls": True, "tools": []},
    "sharegpt": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    "sharegpt_exchanges": lambda q, a: {"conversation": [{"human": q, "assistant": a}]},
    "alpaca": lambda q, a: {"instruction": q, "input": "", "output": a, "history": [["x", "y"]]},
    "prompt_completion": lambda q, a: {"prompt": q, "completion": a},
    "prompt_messages": lambda q, a: {"prompt": messages(q, a)[:1], "completion": messages(q, a)[1:]},
    "preference": lambda q, a: {"prompt": q, "chosen": a, "rejected": "no"},
    "preference_messages": lambda q, a: {"chosen": messages(q, a), "rejected": messages(q, "no")},
    "preference_message": lambda q, a: {
        "conversations": [{"from": "human", "value": q}],
        "chosen": {"from": "gpt", "value": a},
        "rejected": {"from": "gpt", "value": "no"},
    },
    "preference_instruction": lambda q, a: {"instruction": q, "input": "", "chosen": a, "rejected": "no"},
    "preference_question": lambda q, a: {"system": "", "question": q, "chosen": a, "rejected": "no"},
    "dialogue": lambda q, a: {"chosen": f"\n\nHuman: {q}\n\nAssistant: {a}", "rejected": "no"},
    "dialogue_prompt": lambda q, a: {"prompt": f"\n\nHuman: {q}\n\nAssistant:", "chosen": a, "rejected": "no"},
    "ms_swift": lambda q, a: {"query": q, "response": a, "history": []},
    "ultrachat": lambda q, a: {"id": "0", "data": [q, a]},
    "anthropic": anthropic,
    "mistral": mistral,
    "chatml_text": lambda q, a: {"text": f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n"},
}
CHATML_CANNOT = {"<|im_end|> in text"}


def write_every_format(directory: Path) -> dict[str, list[str]]:
    """A file of each format in `directory`, by its name, as JSONL or as an array; the replies of each, in order."""
    expected: dict[str, list[str]] = {}
    for form, record in FORMATS.items():
        replies = [reply for reply in REPLIES if form != "chatml_text" or reply not in CHATML_CANNOT]
        expected[form] = [f"{reply} {form}" for reply in replies]
        made = [record(question(form, number), reply) for number, reply in enumerate(expected[form])]
        if len(expected) % 2:
            text = "".join(json.dumps(each, ensure_ascii=len(expected) % 3 == 0) + "\n" for each in made)
            (directory / f"{form}.jsonl").write_text(text, "utf-8", newline="\n")
        else:
            (directory / f"{form}.json").write_text(
                json.dumps(made, indent=1, ensure_ascii=False), "utf-8", newline="\n"
            )
    return expected
