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
    with_tokens = load_tokenizer(str(tiny.write_tokenizer(tmp_path / "a", None)))
    assert choose_template(with_tokens, None).origin == "chatml"
    base = without_chatml(tmp_path / "b")
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


TOKEN_MAP = {"eos_token": "<|endoftext|>", "bos_token": {"content": "<s>"}}


@pytest.mark.parametrize("decoder", [None, {}])
def test_the_special_tokens_map_counts_where_transformers_reads_it(tmp_path, decoder):
    """An eos_token in it wins, but for a config that has its added_tokens_decoder: such a one holds all itself."""
    transformers = pytest.importorskip("transformers")
    directory = tiny.write_tokenizer(tmp_path / "a")
    (directory / "special_tokens_map.json").write_text(json.dumps(TOKEN_MAP))
    if decoder is not None:
        config = json.loads((directory / "tokenizer_config.json").read_text())
        (directory / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": decoder}))
    files = load_tokenizer(str(directory))
    expected = "<|endoftext|>" if decoder is None else "<|im_end|>"
    assert files.named_tokens()["eos_token"] == expected
    assert transformers.AutoTokenizer.from_pretrained(directory).eos_token == expected


def without_chatml(directory, change=lambda parsed: None):
    """A tokenizer whose last two ids are free, changed further by `change`, with a special_tokens_map.json."""
    tiny.write_tokenizer(directory, None)
    parsed = json.loads((directory / "tokenizer.json").read_text())
    kept = [token for token in parsed["added_tokens"] if "im_" not in token["content"]]
    for number, token in enumerate(kept):
        token["id"] = len(parsed["model"]["vocab"]) + number
    parsed["added_tokens"] = kept
    change(parsed)
    (directory / "tokenizer.json").write_text(json.dumps(parsed))
    (directory / "special_tokens_map.json").write_text(json.dumps(TOKEN_MAP))
    return load_tokenizer(str(directory))


def test_added_chatml_tokens_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    added = without_chatml(tmp_path / "a").with_chatml_tokens()
    added.save(tmp_path / "b", tiny.CHATML)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    ids = {token.text: token.id for token in added.control_tokens()}
    assert theirs.convert_tokens_to_ids(list(added.added)) == [ids[text] for text in added.added]
    assert theirs.eos_token == "<|im_end|>" and theirs.bos_token == "<s>"
    assert len(theirs) == added.vocab_size()


def test_a_chatml_token_of_the_vocabulary_keeps_its_id(tmp_path):
    def into_vocabulary(parsed):
        for token in parsed["added_tokens"]:
            token["id"] += 1
        parsed["model"]["vocab"]["<|im_end|>"] = len(parsed["model"]["vocab"])

    base = without_chatml(tmp_path, into_vocabulary)
    added = base.with_chatml_tokens()
    ids = {token.text: token.id for token in added.control_tokens()}
    assert ids["<|im_end|>"] == base.parsed()["model"]["vocab"]["<|im_end|>"]
    assert added.vocab_size() == base.vocab_size() + 1


def gap_in_vocabulary(parsed):
    parsed["added_tokens"] = []
    parsed["model"]["vocab"]["zz"] = len(parsed["model"]["vocab"]) + 1


def gap_among_added(parsed):
    del parsed["added_tokens"][0]


@pytest.mark.parametrize(("gap", "other"), [(gap_in_vocabulary, "zz"), (gap_among_added, "</think>")])
def test_chatml_tokens_never_take_another_tokens_id(tmp_path, gap, other):
    with pytest.raises(SetupError, match=f"'{other}': there are gaps") as error:
        without_chatml(tmp_path, gap).with_chatml_tokens()
    assert "--chat_template" in error.value.remedy


def test_a_damaged_special_tokens_map_is_a_clear_error(tmp_path):
    directory = tiny.write_tokenizer(tmp_path)
    (directory / "special_tokens_map.json").write_text("[]")
    with pytest.raises(SetupError, match=r"special_tokens_map\.json"):
        load_tokenizer(str(directory))
