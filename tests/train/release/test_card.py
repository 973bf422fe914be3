"""The card and `dft.json` of a saved model: what they say is so, and what others wrote does not speak in them."""

from __future__ import annotations

import dataclasses
import json
import re

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dft_common.manifest import read_manifest
from dft_train.release.card import MARK, Origin, Progress, is_ours, model_card, origin_record
from train import handmade


def origin(**more: object) -> Origin:
    fields = {
        "toolkit_version": "1.2",
        "libraries": {"torch": "2.13"},
        "base_model": "org/name",
        "kind": "model",
        "dataset": {
            "fingerprint": "f00d", "recipe_fingerprint": "1", "rows": 1200, "tokens": 3, "trained_tokens": 2,
            "sources": {"chat": {"conversations": 5, "trained_tokens": 4321}},
        },
        "recipe": {"objective": "dft", "learning_rate": 1e-5},
    }  # fmt: skip
    return msgspec.convert({**fields, **more}, Origin)


AT = Progress(7, 0.5, {"loss": 1.25, "step": 7}, {"eval_loss": 2.5, "eval_chat_loss": 2.25})


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_says_what_was_done():
    card = model_card(origin(), AT)
    assert front_matter(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "org/name",
        "tags": ["dft-toolkit", "dft"],
    }
    for text in ("7 optimizer steps (0.5 epochs)", "1,200 conversations", "f00d", "| `chat` | 5 | 4,321 | 2.25 |"):
        assert text in card
    assert "| `loss` | 1.25 | 2.5 |" in card and "| `learning_rate` | 1e-05 |" in card
    assert "AutoModelForCausalLM.from_pretrained" in card and MARK in card


@pytest.mark.parametrize(("kind", "library"), [("adapter", "peft"), ("merged", "transformers")])
def test_adapters_and_merged_models_say_so(kind, library):
    card = model_card(origin(kind=kind, recipe={"objective": "sft", "lora_r": 8}), AT)
    assert front_matter(card)["library_name"] == library and "lora" in front_matter(card)["tags"]
    assert ("AutoPeftModelForCausalLM" in card) == (kind == "adapter")


def test_a_path_is_no_base_model_for_a_hub(tmp_path, monkeypatch):
    assert "base_model" not in front_matter(model_card(origin(base_model=str(tmp_path)), AT))
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in front_matter(model_card(origin(), AT))


HOSTILE = "x`|<script>\n# [y](http://z) \x1b[31m & ---"


@given(st.one_of(st.just(HOSTILE), st.text(max_size=30)))
def test_text_of_others_stays_one_cell_of_text(text):
    dataset = {**origin().dataset, "sources": {text: {"conversations": 1, "trained_tokens": 2}}}
    card = model_card(origin(dataset=dataset, base_model=text), AT)
    row = next(line for line in card.splitlines() if line.endswith(" | 1 | 2 |  |"))
    # Bars outside of escapes are the table's own.
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 5
    without_code = re.sub(r"`[\w./@:+ -]+`", "", row)
    assert not re.search(r"(?<!\\)[`<*\[]", without_code)
    assert "\x1b" not in card and "<script" not in card
    assert isinstance(front_matter(card), dict)
    assert len(card.splitlines()) <= len(model_card(origin(), AT).splitlines()) + 1


def test_a_readme_of_another_hand_is_known(tmp_path):
    path = tmp_path / "README.md"
    assert is_ours(path)
    path.write_text("# mine")
    assert not is_ours(path)
    path.write_text(model_card(origin(), AT))
    assert is_ours(path)


def test_a_run_leaves_card_and_record(rows, qwen3, train_here, tmp_path):
    train, validation = rows
    named = [dataclasses.replace(row, source=HOSTILE) if at % 2 else row for at, row in enumerate(train)]
    dataset = handmade.write_dataset(tmp_path / "data", named, validation)
    run = tmp_path / "run"
    run.mkdir()
    (run / "README.md").write_text("# mine")
    code, error = train_here(
        "--dataset_dir", dataset, "--model_name_or_path", qwen3, "--output_dir", run, "--max_steps", 2,
        "--save_steps", 1, "--logging_steps", 1, "--eval_strategy", "steps", "--eval_steps", 2, "--dft_alpha", 0.4,
    )  # fmt: skip
    assert code == 0, error
    assert (run / "README.md").read_text() == "# mine"
    manifest = read_manifest(dataset)
    for directory, step in ((run, 2), (run / "checkpoint-1", 1)):
        record = json.loads((directory / "dft.json").read_text())
        assert record["progress"]["step"] == step and record["progress"]["training"]["loss"] > 0
        assert record["dataset"]["fingerprint"] == manifest.fingerprint
        assert set(record["dataset"]["sources"]) == {source.name for source in manifest.sources}
        assert record["recipe"]["dft_alpha"] == "0.4" and record["base_model"] == str(qwen3)
    assert json.loads((run / "dft.json").read_text())["progress"]["evaluation"]["eval_loss"] > 0
    assert manifest.fingerprint in (run / "checkpoint-2" / "README.md").read_text()


def test_the_record_holds_all_of_the_origin():
    assert origin_record(origin(), AT)["progress"] == AT._asdict()
    assert set(origin_record(origin(), AT)) == {*msgspec.structs.asdict(origin()), "progress"}
