"""Tokens that the build added to a base model's tokenizer: their rows, how they begin and that they are learnt."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from dft_common.manifest import read_manifest
from dft_train.models.load import add_rows
from train import handmade

NEW_END, NEW_START = "<|new_end|>", "<|new_start|>"
NEW = (NEW_END, NEW_START)
END_ID = handmade.VOCAB
IDS = [handmade.VOCAB, handmade.VOCAB + 1]
STEPS = 4
FLAGS = ("--max_steps", STEPS, "--torch_dtype", "float32", "--bf16", "False", "--report_to", "none")


@pytest.fixture(scope="module")
def data(tmp_path_factory, rows) -> Path:
    """The usual dataset, with new tokens in the place of ChatML's: one is a label, the other context alone."""
    swap = {handmade.VOCAB - 1: IDS[0], handmade.VOCAB - 2: IDS[1]}

    def swapped(conversations):
        return [dataclasses.replace(row, ids=[swap.get(i, i) for i in row.ids]) for row in conversations]

    directory = tmp_path_factory.mktemp("added") / "data"
    return handmade.write_dataset(directory, *map(swapped, rows), added=NEW, end_of_turn=NEW_END)


def matrices(directory: Path) -> list[torch.Tensor]:
    """[rows of the embedding, rows of the head], of a model on disk."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return [layer.weight.detach() for layer in (model.get_input_embeddings(), model.get_output_embeddings())]


@pytest.fixture
def untrained(train_here, data, tmp_path):
    """The rows of a model as training finds them: after a run whose steps change nothing."""

    def run(model: Path, name: str = "run") -> list[torch.Tensor]:
        code, error = train_here(
            "--dataset_dir", data, "--model_name_or_path", model, "--output_dir", tmp_path / name, *FLAGS,
            "--learning_rate", 0, "--save_strategy", "no",
        )  # fmt: skip
        assert code == 0, error
        return matrices(tmp_path / name)

    return run


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_new_rows_begin_at_the_mean_of_the_others(architecture, request, untrained):
    model = request.getfixturevalue(architecture)
    torch.manual_seed(1)
    first = untrained(model)
    torch.manual_seed(2)
    second = untrained(model, "again")
    for before, found, again in zip(matrices(model), first, second, strict=True):
        assert len(found) == handmade.VOCAB + len(NEW)
        assert torch.equal(found[: len(before)], before)
        assert ((found[IDS] - before.mean(0)).abs() < 0.05 * before.std(0)).all()
        assert not torch.equal(*found[IDS])
        assert torch.equal(found, again)


def test_in_16_bits_too_no_two_new_rows_begin_alike(qwen3, data):
    """A mean far from 0 leaves the fewest bits for the noise."""
    net = AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.bfloat16)
    with torch.no_grad():
        net.get_input_embeddings().weight += 0.2
    add_rows(net, read_manifest(data), seed=1)
    for layer in (net.get_input_embeddings(), net.get_output_embeddings()):
        new, old = layer.weight[IDS].float(), layer.weight[: handmade.VOCAB].float()
        assert (new[0] != new[1]).sum() > 10
        assert ((new - old.mean(0)).abs() < 0.05 * old.std(0) + 2e-3).all()


@pytest.mark.parametrize("spare", [1, 2, 8])
def test_rows_that_pad_the_vocabulary_are_kept_as_they_are(spare, untrained, tmp_path):
    model = handmade.write_model(tmp_path / "padded", "qwen3", vocab=handmade.VOCAB + spare)
    for before, found in zip(matrices(model), untrained(model), strict=True):
        assert len(found) == handmade.VOCAB + max(spare, len(NEW))
        assert torch.equal(found[: len(before)], before)


def assert_learnt(model: PreTrainedModel, before: list[torch.Tensor], tied: bool) -> None:
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding is head) == tied
    for old, new in zip(before, (embedding, head), strict=True):
        assert (new[IDS] - old.mean(0)).abs().amax(1).min() > 5e-3
    # One is a label and the other is not, so that they part.
    assert (head[IDS[0]] - head[IDS[1]]).abs().max() > 5e-3


def assert_usable(directory: Path) -> PreTrainedModel:
    """Loads with transformers alone, and generates from ids of the tokenizer beside it until the end of the turn."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert model.config.vocab_size == handmade.VOCAB + len(NEW)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer("ab" + NEW_START, add_special_tokens=False, return_tensors="pt").input_ids
    assert ids.tolist() == [[*tokenizer("ab", add_special_tokens=False).input_ids, IDS[1]]]
    stops = GenerationConfig.from_pretrained(directory).eos_token_id
    assert stops == [256, END_ID]
    out = model.generate(ids, max_new_tokens=3, do_sample=False, bad_words_ids=[[i] for i in range(256)])
    assert out.shape[1] > ids.shape[1]
    return model


@pytest.mark.parametrize("architecture", [pytest.param("qwen3", marks=pytest.mark.slow), "llama"])
def test_new_rows_are_learnt_and_two_ranks_of_zero3_learn_the_same(
    architecture, request, data, zero3_float32, train_here, ranks, tmp_path
):
    """With a head of its own and with tied embeddings."""
    model = request.getfixturevalue(architecture)
    common = (
        "--dataset_dir", data, "--model_name_or_path", model, *FLAGS, "--learning_rate", 1e-2, "--adam_epsilon", 1e-4,
        "--save_strategy", "steps", "--save_steps", 2, "--save_only_model",
    )  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    code, error = train_here(*common, "--output_dir", one, "--per_device_train_batch_size", 2)
    assert code == 0 and "resized to 261 rows" in error, error
    ranks(2, *common, "--output_dir", two, "--per_device_train_batch_size", 1, "--deepspeed", zero3_float32)
    before = matrices(model)
    for run in (one, two):
        assert_learnt(assert_usable(run), before, tied=architecture == "llama")
        assert_usable(run / f"checkpoint-{STEPS // 2}")
    for mine, theirs in zip(matrices(two), matrices(one), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
