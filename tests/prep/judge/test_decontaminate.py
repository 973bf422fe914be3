from __future__ import annotations

import gzip
import itertools
import json
import pickle
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tiny
from dft_common.errors import DataError, SetupError
from dft_common.records import Conversation, Message
from dft_prep.judge.decontaminate import load_ngrams
from dft_prep.judge.ngrams import FEWEST_WORDS, WORDS, Ngrams, make_ngrams, words_of

LINE = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
WORD_LIST = LINE.split()


def conversation(*texts: str) -> Conversation:
    roles = itertools.cycle(["user", "assistant"])
    return Conversation(messages=tuple(Message(role=next(roles), content=text) for text in texts))  # pyright: ignore[reportArgumentType]


# Words


def is_ideograph(character: str) -> bool:
    """By Unicode's blocks, in which later versions fill what is still free."""
    blocks = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFD))
    return any(first <= ord(character) <= last for first, last in blocks)


def naive_words(text: str) -> list[str]:
    """Character by character."""
    words: list[str] = []
    inside = False
    for character in unicodedata.normalize("NFKC", text).casefold():
        name = unicodedata.name(character, "")
        alone = is_ideograph(character) or (
            character.isalnum() and name.startswith(("IDEOGRAPHIC", "HIRAGANA", "KATAKANA"))
        )
        letter = character.isalnum() or alone
        if letter and inside and not alone:
            words[-1] += character
        elif letter:
            words.append(character)
        inside = letter and not alone
    return words


ODD_CHARACTERS = "aB7_-. \n\t’…—\u200b\u00a0éÉßİﬁ½´²e\u0301Ａ０，（）。！ 首先。カｶﾞー々々〇あ゛한국ไทยक्ष😀𠀀\u0130①"


@settings(max_examples=200)
@given(st.text(ODD_CHARACTERS, max_size=30) | st.text(max_size=20))
@example("x\u00b4\u0301 \u2126 ͅ ª")
def test_words_are_what_is_left_without_case_punctuation_and_width(text):
    assert [word.decode() for word in words_of(text)] == naive_words(text)


def test_every_character_makes_the_words_that_it_makes_by_itself():
    for code in [*range(0x3400), *range(0xF900, 0x10000)]:
        text = f"a{chr(code)}b"
        assert [word.decode() for word in words_of(text)] == naive_words(text), hex(code)


# Runs


def naive_runs(texts: list[str]) -> set[tuple[str, ...]]:
    runs = set()
    for words in map(naive_words, texts):
        if len(words) >= FEWEST_WORDS:
            size = min(WORDS, len(words))
            runs |= {tuple(words[start : start + size]) for start in range(len(words) - size + 1)}
    return runs


def naive_find(texts: list[str], runs: set[tuple[str, ...]]) -> int | None:
    """The first text that holds a run."""
    for number, words in enumerate(map(naive_words, texts)):
        for size in range(FEWEST_WORDS, WORDS + 1):
            if any(tuple(words[start : start + size]) in runs for start in range(len(words) - size + 1)):
                return number
    return None


# Few words, so that blocks of them are shared where no run is.
SENTENCE = st.lists(st.sampled_from(["a", "B", "c,", "7", "首", "É"]), max_size=30)


@settings(max_examples=200)
@given(st.lists(SENTENCE, min_size=1, max_size=4), st.lists(SENTENCE, min_size=1, max_size=3), st.data())
def test_what_is_found_is_what_a_set_of_tuples_finds(tests, messages, data):
    for message in messages:
        copied = data.draw(st.sampled_from(tests))
        start, size = data.draw(st.integers(0, 20)), data.draw(st.integers(5, 16))
        at = data.draw(st.integers(0, len(message)))
        message[at:at] = copied[start : start + size]
    test_texts, texts = [" ".join(words) for words in tests], [" ".join(words) for words in messages]
    runs = naive_runs(test_texts)
    ngrams = make_ngrams(test_texts)
    found = ngrams.find(conversation(*texts))
    assert len(ngrams) == len(runs)
    assert (found and found[0]) == naive_find(texts, runs)
    if found:
        assert tuple(found[1].split()) in runs


@pytest.mark.parametrize("size", [8, 10, 13, 20])
def test_a_run_is_found_wherever_it_stands(size):
    words = [f"w{number}" for number in range(size)]
    ngrams = make_ngrams([" ".join(words)])
    for before in range(20):
        assert ngrams.find_in(" ".join([*(["x"] * before), *words, "y"])), before
    missing = [*words[: min(size, WORDS) - 1], "x"]
    assert ngrams.find_in(" ".join(missing)) is None


def test_case_punctuation_and_width_do_not_hide_a_copy():
    ngrams = make_ngrams(["Ａ train “leaves” at 7:00 – it’s 60 km; how far is it from home?"])
    assert ngrams.find(conversation("hi", "x a TRAIN leaves, at 7 00\nit's 60 km (how far is it) from")) == (
        1,
        "a train leaves at 7 00 it s 60 km how far is",
    )


def test_chinese_is_compared_by_the_character():
    ngrams = make_ngrams(["下列关于细胞结构的说法中，正确的是哪一项？"])
    assert ngrams.find_in("题目：关于细胞结构的说法中正确的是哪项") == "关 于 细 胞 结 构 的 说 法 中 正 确 的"
    assert ngrams.find_in("关于细胞结构的说法，错误的是哪一项") is None


def test_a_run_never_lies_across_two_texts():
    ngrams = make_ngrams([LINE])
    first, second = " ".join(WORD_LIST[:7]), " ".join(WORD_LIST[7:])
    assert ngrams.find(conversation(first, second)) is None
    assert make_ngrams([first, second]).find_in(LINE) is None
    assert ngrams.find(Conversation(messages=(Message(role="assistant", content="a", reasoning=LINE),))) is not None


def test_too_short_a_text_is_not_compared():
    assert len(make_ngrams(["What is the capital of France?"])) == 0
    assert make_ngrams(["What is the capital of France?"]).find_in("What is the capital of France?") is None
    assert make_ngrams([]).find_in(LINE) is None


def test_what_was_found_is_shown_short():
    found = make_ngrams([" ".join(["wordswordswords" * 5] * 13)]).find_in(" ".join(["WORDSwordswords" * 5] * 14))
    assert found is not None
    assert len(found) < 130


def test_the_same_runs_have_the_same_fingerprint():
    ngrams = make_ngrams([LINE, "a b c d e f g h i"])
    assert ngrams.fingerprint == make_ngrams(["A, b c d e f g h i!", LINE, LINE]).fingerprint
    assert ngrams.fingerprint != make_ngrams([LINE]).fingerprint != make_ngrams([]).fingerprint


def test_it_travels_to_workers_at_a_dozen_bytes_a_run():
    texts = [f"w{number} {LINE} {number}" for number in range(1000)]
    ngrams = make_ngrams(" ".join(f"w{start + at}" for at in range(500)) for start in range(0, 50_000, 500))
    packed = pickle.dumps(ngrams)
    assert len(packed) < 13 * len(ngrams)
    unpacked: Ngrams = pickle.loads(packed)  # noqa: S301
    assert unpacked.fingerprint == ngrams.fingerprint
    assert unpacked.find_in(texts[0]) is None
    assert unpacked.find_in(" ".join(f"w{at}" for at in range(480, 500))) is not None


# Files

MESSAGES = {"messages": [{"role": "system", "content": f"system {LINE}"}, *tiny.turns("q", LINE)]}
QUESTION_ALONE = {"messages": [{"role": "system", "content": f"system {LINE}"}, {"role": "user", "content": LINE}]}
FILES = {
    "messages.jsonl": json.dumps(MESSAGES),
    "sharegpt.json": json.dumps([{"conversations": [{"from": "human", "value": LINE}, {"from": "gpt", "value": "a"}]}]),
    "alpaca.json": json.dumps([{"instruction": "q", "output": LINE}], indent=1),
    "no_reply.jsonl": json.dumps(QUESTION_ALONE),
    "benchmark.jsonl": json.dumps({"id": 7, "stem": {"text": LINE}, "choices": ["a", "b"], "system": f"system {LINE}"}),
    "strings.json": json.dumps([LINE, "short"]),
    "plain.txt": f"A title\n\n{LINE.replace(' ', chr(10))}\n",
    "no_suffix": f"A title\n\n{LINE}\n\nmore",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_the_texts_of_a_file_are_compared(tmp_path, name, packed):
    path = tmp_path / (f"{name}.gz" if packed else name)
    data = FILES[name].encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    ngrams = load_ngrams([str(path)])
    assert ngrams.fingerprint == make_ngrams([LINE]).fingerprint


def test_paragraphs_are_texts_of_their_own(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n \n".join([" ".join(WORD_LIST[:7]), " ".join(WORD_LIST[7:]), "a b c d e f g h"]), "utf-8-sig")
    ngrams = load_ngrams([str(path)])
    assert ngrams.find_in(LINE) is None
    assert ngrams.find_in("x A B C D E F G H") == "a b c d e f g h"


def test_several_files_are_one_set(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"{name[0]} {LINE}", "utf-8")
    assert len(load_ngrams([str(tmp_path / "*.txt")])) == len(make_ngrams([f"a {LINE}", f"b {LINE}"]))
    assert len(load_ngrams([])) == 0


REFUSED = {
    "short.txt": (b"hello", "no text of 8 words"),
    "latin.txt": (b"caf\xe9 " * 20, "0xe9 is not UTF-8"),
    "broken.jsonl": (json.dumps(MESSAGES).encode() + b'\n{"a": 1,}\n', "trailing_comma"),
    "picture.jsonl": (b"\x89PNG\r\n\x1a\n\0\0", "PNG"),
    "cut.txt.gz": (gzip.compress(LINE.encode() * 100)[:-20], "cut"),
    "array.jsonl": (b"[" + json.dumps(MESSAGES).encode() + b"]", "one JSON array"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_compared_is_an_error_that_names_it(tmp_path, name):
    data, words = REFUSED[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        load_ngrams([str(tmp_path / name)])
    assert name in caught.value.message
    assert words in caught.value.message
    assert caught.value.remedy


def test_a_file_that_is_not_there_names_the_flag(tmp_path):
    with pytest.raises(SetupError, match="--decontaminate"):
        load_ngrams([str(tmp_path / "none.jsonl")])
