"""The build warns where the token that ends a turn does not end generation, and says how to set it."""

from __future__ import annotations

import json

import pytest

import tiny
from dft_common.errors import SetupError
from dft_prep.pipeline.stops import stop_warnings
from dft_prep.tokenizer_files import load_tokenizer


def directory_with(tmp_path, generation: object = None):
    directory = tiny.write_tokenizer(tmp_path)
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation), "utf-8")
    return directory


def control_id(directory, text: str) -> int:
    return next(token.id for token in load_tokenizer(str(directory)).control_tokens() if token.text == text)


def test_the_eos_token_is_a_stop(tmp_path):
    assert stop_warnings(load_tokenizer(str(directory_with(tmp_path))), "<|im_end|>") == []


def test_a_token_that_nothing_stops_at_is_named_with_its_remedy(tmp_path):
    tokenizer = load_tokenizer(str(directory_with(tmp_path)))
    (warning,) = stop_warnings(tokenizer, "<|end|>")
    token_id = control_id(tmp_path, "<|end|>")
    assert "turns end in <|end|>, but generation ends at <|im_end|> (eos_token in tokenizer_config.json)." in warning
    assert f"add its id {token_id} to eos_token_id in generation_config.json" in warning


@pytest.mark.parametrize("form", ["number", "list"])
def test_the_generation_config_beside_the_tokenizer_counts(tmp_path, form):
    plain = load_tokenizer(str(directory_with(tmp_path)))
    token_id = control_id(tmp_path, "<|end|>")
    ids = token_id if form == "number" else [1, token_id]
    tokenizer = load_tokenizer(str(directory_with(tmp_path, {"eos_token_id": ids})))
    assert stop_warnings(tokenizer, "<|end|>") == []
    assert tokenizer.fingerprint() == plain.fingerprint()
    tokenizer.save(tmp_path / "saved", tiny.CHATML)
    assert not (tmp_path / "saved" / "generation_config.json").exists()


def test_a_template_without_an_end_is_warned_of(tmp_path):
    (warning,) = stop_warnings(load_tokenizer(str(directory_with(tmp_path))), None)
    assert "will not learn to stop" in warning


def test_each_token_that_ends_generation_is_named_with_its_file(tmp_path):
    token_id = control_id(directory_with(tmp_path), "<s>")
    directory = directory_with(tmp_path, {"eos_token_id": [token_id, 7]})
    (warning,) = stop_warnings(load_tokenizer(str(directory)), "<|end|>")
    expected = "<|im_end|> (eos_token in tokenizer_config.json) and <s>, id 7 (eos_token_id in generation_config.json)"
    assert f"generation ends at {expected}." in warning
    (directory / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|user|>"}}))
    (warning,) = stop_warnings(load_tokenizer(str(directory)), "<|end|>")
    assert "<|user|> (eos_token in special_tokens_map.json) and <s>" in warning
    assert "or make it the eos_token in special_tokens_map.json" in warning
    (warning,) = stop_warnings(load_tokenizer(str(directory)), "<|im_end|>")
    assert "turns end in <|im_end|>, but" in warning


def test_no_token_at_all_ends_generation(tmp_path):
    directory = directory_with(tmp_path, {"eos_token_id": None})
    (directory / "tokenizer_config.json").write_text("{}")
    (warning,) = stop_warnings(load_tokenizer(str(directory)), "<|end|>")
    assert "no token ends generation (no eos_token in tokenizer_config.json, no eos_token_id in" in warning


@pytest.mark.parametrize("text", ['{"eos_token_id": "</s>"}', '{"eos_token_id": [true]}', "[1]", "{", "\udcff"])
def test_a_damaged_generation_config_is_a_clear_error(tmp_path, text):
    directory = directory_with(tmp_path)
    (directory / "generation_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SetupError, match=r"generation_config\.json") as error:
        load_tokenizer(str(directory))
    assert error.value.remedy and error.value.exit_code == 2
