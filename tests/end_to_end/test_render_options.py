"""`--unroll_turns`, `--chat_template_kwargs` and the build's warnings, as a user meets them."""

from __future__ import annotations

import json

import pytest

import tiny
from dft_common.manifest import read_manifest
from dft_common.reader import SplitReader


@pytest.fixture
def thinking_dir(tmp_path):
    return tiny.write_tokenizer(tmp_path / "thinking", tiny.THINKING)


def reasoned(count: int) -> list[dict]:
    """`count` conversations of two turns with reasoning, the first of them twice."""
    records = []
    for number in range(count):
        turns = tiny.turns(f"q{number}", f"a{number}", f"more {number}", f"b{number}")
        for turn in turns[1::2]:
            turn["reasoning_content"] = f"because of {turn['content']}"
        records.append({"messages": turns})
    return [records[0], *records]


def build(dft_prep, data, tokenizer, out, *more):
    return dft_prep("build", "--data_files", data, "--tokenizer", tokenizer, "--output_dir", out, *more)


def test_unrolled_each_turn_is_a_row_of_its_conversation(dft_prep, thinking_dir, tmp_path):
    data = tiny.write_jsonl(tmp_path / "data.jsonl", reasoned(30))
    flags = ("--unroll_turns", "--validation_split_percentage", 40, "--preprocessing_num_workers", 1)
    build(dft_prep, data, thinking_dir, tmp_path / "out", *flags)
    manifest = read_manifest(tmp_path / "out")
    counts = manifest.counts
    assert (counts.read, counts.kept, counts.duplicates, counts.rows) == (31, 30, 1, 60)
    assert "history_rewritten" not in manifest.warnings
    sides = {}
    for split, info in manifest.splits.items():
        reader = SplitReader(tmp_path / "out", split, manifest)
        for number in range(info.rows):
            sides.setdefault(reader.row(number).id, []).append(split)
    assert len(sides) == 30 and all(len(set(splits)) == 1 and len(splits) == 2 for splits in sides.values())
    assert {splits[0] for splits in sides.values()} == {"train", "validation"}
    assert dft_prep("verify", tmp_path / "out").returncode == 0


def test_a_limit_on_a_source_counts_conversations(dft_prep, thinking_dir, tmp_path):
    data = tiny.write_jsonl(tmp_path / "data.jsonl", reasoned(30))
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps({"data_files": [{"path": str(data), "max_conversations": 7}]}))
    done = dft_prep(
        "build", "--config", config, "--tokenizer", thinking_dir, "--output_dir", tmp_path / "out", "--unroll_turns"
    )
    counts = read_manifest(tmp_path / "out").counts
    assert (counts.kept, counts.rows, counts.left_out) == (7, 14, {"over_max_conversations": 23})
    # They are not in the quarantine, so nobody is sent there.
    assert "over_max_conversations 23\n" in done.stderr
    assert (tmp_path / "out" / "quarantine.jsonl").read_bytes() == b""


def test_history_that_a_template_rewrites_is_counted_and_the_remedies_named(dft_prep, thinking_dir, tmp_path):
    data = tiny.write_jsonl(tmp_path / "data.jsonl", reasoned(5))
    done = build(dft_prep, data, thinking_dir, tmp_path / "out")
    assert read_manifest(tmp_path / "out").warnings["history_rewritten"] == 6
    line = next(line for line in done.stderr.splitlines() if "6 x history_rewritten: An earlier reply" in line)
    assert "--train_on last" in line and "--unroll_turns" in line


def test_an_end_of_turn_that_ends_no_generation_is_warned_of(dft_prep, tmp_path):
    model = tiny.write_tokenizer(tmp_path / "model", tiny.PHI)
    data = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.numbered(5))
    done = build(dft_prep, data, model, tmp_path / "out")
    assert "turns end in <|end|>, but generation ends at <|im_end|>" in done.stderr
    (model / "generation_config.json").write_text('{"eos_token_id": [356]}')
    done = build(dft_prep, data, model, tmp_path / "again")
    assert "generation ends at" not in done.stderr


def test_template_variables_are_part_of_the_recipe(dft_prep, tmp_path):
    source = tiny.CHATML.replace(
        "{{ '<|im_start|>assistant\n' }}",
        "{{ '<|im_start|>assistant\n' }}{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
    )
    model = tiny.write_tokenizer(tmp_path / "model", source)
    data = tiny.write_jsonl(tmp_path / "data.jsonl", [{"messages": tiny.turns("q", "<think>\n\n</think>\n\na")}])
    build(dft_prep, data, model, tmp_path / "on")
    build(dft_prep, data, model, tmp_path / "off", "--chat_template_kwargs", '{"enable_thinking": false}')
    on, off = (read_manifest(tmp_path / name) for name in ("on", "off"))
    assert off.recipe["chat_template_kwargs"] == {"enable_thinking": False}
    assert off.counts.tokens == on.counts.tokens and off.counts.trained_tokens < on.counts.trained_tokens
    config = tmp_path / "c.yaml"
    config.write_text("chat_template_kwargs:\n  enable_thinking: false\n")
    done = build(dft_prep, data, model, tmp_path / "off", "--config", config)
    assert "is up to date" in done.stderr


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "expected a JSON object"),
        ('{"messages": []}', "'messages' is what each conversation"),
    ],
)
def test_wrong_template_variables_are_a_clear_error(value, message, dft_prep, model_dir, tmp_path):
    data = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.numbered(2))
    words = ("--data_files", data, "--tokenizer", model_dir, "--output_dir", tmp_path / "out")
    done = dft_prep("build", *words, "--chat_template_kwargs", value, check=2)
    assert message in done.stderr
