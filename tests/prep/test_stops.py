"""The build warns where the token that ends a turn does not end generation, and says how to set it."""

from __future__ import annotations

import json

import pytest

import tiny
from dft_common.errors import SetupError
from dft_prep.stops import stop_warnings
from dft_prep.tokenizer_files import load_tokenizer


def directory_with(tmp_path, generation: object = None):
    directory = tiny.write_tokenizer(tmp_path)
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation), "utf-8")
    return directory


def test_the_eos_token_is_a_stop(tmp_path):
    assert stop_warnings(load_tokenizer(str(directory_with(tmp_path))), "<|im_end|>") == []


def test_a_token_that_nothing_stops_at_is_named_with_its_remedy(tmp_path):
    tokenizer = load_tokenizer(str(directory_with(tmp_path)))
    (warning,) = stop_warnings(tokenizer, "<|end|>")
    token_id = next(token.id for token in tokenizer.control_tokens() if token.text == "<|end|>")
    assert "turns end in <|end|>" in warning and "<|im_end|>" in warning
    assert f"add its id {token_id} to eos_token_id in generation_config.json" in warning


@pytest.mark.parametrize("form", ["number", "list"])
def test_the_generation_config_beside_the_tokenizer_counts(tmp_path, form):
    plain = load_tokenizer(str(directory_with(tmp_path)))
    token_id = next(token.id for token in plain.control_tokens() if token.text == "<|end|>")
    ids = token_id if form == "number" else [1, token_id]
    tokenizer = load_tokenizer(str(directory_with(tmp_path, {"eos_token_id": ids})))
    assert stop_warnings(tokenizer, "<|end|>") == []
    assert tokenizer.fingerprint() == plain.fingerprint()
    tokenizer.save(tmp_path / "saved", tiny.CHATML)
    assert not (tmp_path / "saved" / "generation_config.json").exists()


def test_a_template_without_an_end_is_warned_of(tmp_path):
    (warning,) = stop_warnings(load_tokenizer(str(directory_with(tmp_path))), None)
    assert "will not learn to stop" in warning


@pytest.mark.parametrize("generation", [{"eos_token_id": "</s>"}, [1]])
def test_a_damaged_generation_config_is_a_clear_error(tmp_path, generation):
    with pytest.raises(SetupError, match=r"generation_config\.json"):
        load_tokenizer(str(directory_with(tmp_path, generation)))
