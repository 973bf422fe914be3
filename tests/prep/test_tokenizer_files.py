"""Finding and reading a tokenizer's files, and what is said where they are missing."""

from __future__ import annotations

import json
import sys

import pytest

import tiny
from dft_common.errors import SetupError
from dft_prep.recipe import choose_template
from dft_prep.tokenizer_files import load_tokenizer


def test_reads_json_config_and_template(tmp_path):
    files = load_tokenizer(str(tiny.write_tokenizer(tmp_path)))
    assert files.chat_template == tiny.CHATML
    assert files.named_tokens() == {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    texts = [token.text for token in files.control_tokens()]
    assert set(texts) == set(tiny.CONTROL)
    assert texts == sorted(texts, key=lambda text: (-len(text), text)), "longest first"


@pytest.mark.parametrize(
    "value", [tiny.PHI, [{"name": "default", "template": tiny.PHI}, {"name": "x", "template": ""}]]
)
def test_a_template_inside_the_config_is_found(tmp_path, value):
    directory = tiny.write_tokenizer(tmp_path, template=None)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": value}))
    assert load_tokenizer(str(directory)).chat_template == tiny.PHI


def test_what_is_saved_loads_the_same_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    files = load_tokenizer(str(tiny.write_tokenizer(tmp_path / "a")))
    files.save(tmp_path / "b", tiny.PHI)
    again = load_tokenizer(str(tmp_path / "b"))
    assert again.fingerprint() == files.fingerprint()
    assert again.chat_template == tiny.PHI
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "b").chat_template == tiny.PHI


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nowhere" / "at" / "all", "no such directory"),
        (lambda p: p, "neither tokenizer.json nor tokenizer.model"),
        (lambda p: (p / "f").write_text("x") and p / "f", "this is a file"),
        (lambda p: (p / "tokenizer.json").write_text("{}") and p, "cannot load it"),
    ],
)
def test_a_missing_or_broken_tokenizer_is_a_setup_error_with_a_remedy(tmp_path, make, message):
    with pytest.raises(SetupError, match=message) as error:
        load_tokenizer(str(make(tmp_path)))
    assert error.value.remedy


def sentencepiece_model(directory, size=400):
    spm = pytest.importorskip("sentencepiece")
    texts = [f"sentence number {i} about topic {i * i}" for i in range(200)]
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=size,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return directory


def test_a_sentencepiece_model_alone_is_converted(tmp_path):
    pytest.importorskip("transformers")
    directory = sentencepiece_model(tmp_path)
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    files = load_tokenizer(str(directory))
    import sentencepiece
    from tokenizers import Tokenizer

    theirs = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    text = "sentence number 7 about ünknown"
    assert Tokenizer.from_str(files.tokenizer_json).encode(text, add_special_tokens=False).ids == theirs.encode(text)


def test_without_transformers_a_sentencepiece_model_names_the_extra(tmp_path, monkeypatch):
    directory = sentencepiece_model(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SetupError) as error:
        load_tokenizer(str(directory))
    assert "dft-toolkit[train]" in error.value.remedy
    assert error.value.exit_code == 2


def test_a_base_models_tokenizer_without_a_template(tmp_path):
    made = tiny.byte_tokenizer()
    with_tokens = load_tokenizer(str(tiny.write_tokenizer(tmp_path / "a", None, made)))
    assert choose_template(with_tokens, None).origin == "chatml"
    bare = json.loads(with_tokens.tokenizer_json)
    bare["added_tokens"] = [t for t in bare["added_tokens"] if "im_" not in t["content"]]
    directory = tiny.write_tokenizer(tmp_path / "b", None, made)
    (directory / "tokenizer.json").write_text(json.dumps(bare))
    base = load_tokenizer(str(directory))
    for wanted in (None, "chatml"):
        with pytest.raises(SetupError) as error:
            choose_template(base, wanted)
        assert "--add_chatml_tokens" in error.value.remedy
    added = base.with_chatml_tokens()
    assert added.added == ("<|im_start|>", "<|im_end|>")
    assert added.vocab_size() == base.vocab_size() + 2
    assert added.named_tokens()["eos_token"] == "<|im_end|>"
    assert choose_template(added, None).origin == "chatml"


def test_a_template_that_is_no_file_is_a_setup_error(tmp_path):
    files = load_tokenizer(str(tiny.write_tokenizer(tmp_path)))
    with pytest.raises(SetupError, match="cannot be read"):
        choose_template(files, "chatlm")


def test_a_models_generation_config_is_no_tokenizer_file(tmp_path):
    directory = tiny.write_tokenizer(tmp_path / "a")
    (directory / "generation_config.json").write_text("{}")
    load_tokenizer(str(directory)).save(tmp_path / "b", tiny.PHI)
    assert not (tmp_path / "b" / "generation_config.json").exists()
