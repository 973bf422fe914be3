"""The generation config that checkpoints get: it stops where the template's turns end, and it can be saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from dft_train.models.load import teach_to_stop
from train import handmade


class Model(torch.nn.Module):
    """What `teach_to_stop` reads of a model."""

    def __init__(self, generation_config: GenerationConfig | None, config: object = None) -> None:
        super().__init__()
        self.config = config
        if generation_config is not None:
            self.generation_config = generation_config


@pytest.mark.parametrize(
    ("known", "token_id", "expected"),
    [
        (None, 7, 7),
        (3, 7, [3, 7]),
        ([9, 3], 7, [9, 3, 7]),
        ([9, 3, 9], 7, [9, 3, 7]),
        (7, 7, 7),
        ([9, 7], 7, [9, 7]),
        ([9, 7], None, [9, 7]),
        (None, None, None),
    ],
)
def test_the_end_of_turn_joins_those_that_are_there(known, token_id, expected, tmp_path):
    model = Model(GenerationConfig(eos_token_id=known, max_length=99))
    teach_to_stop(model, token_id)
    model.generation_config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved.get("eos_token_id") == expected
    assert saved["max_length"] == 99


def test_a_model_without_a_generation_config_gets_one(qwen3, tmp_path):
    model = Model(None, AutoModelForCausalLM.from_pretrained(qwen3).config)
    teach_to_stop(model, 7)
    assert model.generation_config.eos_token_id == [256, 7]


def test_settings_at_odds_can_be_saved(tmp_path):
    sampling = Model(GenerationConfig(eos_token_id=3))
    # As files have it: loading does not mind.
    sampling.generation_config.update(do_sample=False, temperature=0.6)
    teach_to_stop(sampling, 7)
    sampling.generation_config.save_pretrained(tmp_path / "sampling")
    assert GenerationConfig.from_pretrained(tmp_path / "sampling").temperature == 0.6
    beams = Model(GenerationConfig(eos_token_id=3, pad_token_id=5))
    beams.generation_config.update(num_beams=1, early_stopping=True)
    teach_to_stop(beams, 7)
    beams.generation_config.save_pretrained(tmp_path / "beams")
    saved = GenerationConfig.from_pretrained(tmp_path / "beams")
    assert (saved.eos_token_id, saved.pad_token_id) == ([3, 7], 5)


@pytest.mark.parametrize("generates", [True, False])
def test_every_checkpoint_and_the_final_model_have_it(generates, dataset, qwen3, train_here, tmp_path, monkeypatch):
    """Also of a model whose code cannot generate, with which transformers saves no generation config."""
    model = Path(shutil.copytree(qwen3, tmp_path / "model"))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 256]}))
    if not generates:
        from transformers import Qwen3ForCausalLM

        monkeypatch.setattr(Qwen3ForCausalLM, "can_generate", classmethod(lambda cls: False))
    code, error = train_here(
        "--dataset_dir", dataset, "--model_name_or_path", model, "--output_dir", tmp_path / "run", "--max_steps", 2,
        "--save_strategy", "steps", "--save_steps", 1,
    )  # fmt: skip
    assert code == 0, error
    # Without generate, transformers does not read the file; what config.json says is kept.
    before = [5, 256] if generates else [256]
    for directory in (tmp_path / "run", tmp_path / "run" / "checkpoint-1", tmp_path / "run" / "checkpoint-2"):
        assert GenerationConfig.from_pretrained(directory).eos_token_id == [*before, handmade.VOCAB - 1]
