"""One source of each format of the wild in one build: every record accounted for, every reply intact."""

from __future__ import annotations

import json

from datasets import load_from_disk
from tokenizers import Tokenizer

import wild


def test_every_format_in_one_build(dft_prep, model_dir, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    expected = wild.write_every_format(data)
    done = dft_prep("build", "--data_files", *sorted(data.iterdir()), "--tokenizer", model_dir, "--output_dir", "out",
                    "--validation_split_percentage", 0)  # fmt: skip
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    for source in manifest["sources"]:
        counts = source["counts"]
        assert counts["read"] == counts["kept"] == len(expected[source["name"]]), source
    assert "chatml_text is chatml_text 100 % of 11 records" in done.stderr

    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    found: dict[str, list[str]] = {}
    for row in load_from_disk(str(tmp_path / "out"))["train"]:
        trained = [token for token, live in zip(row["input_ids"], row["assistant_masks"], strict=True) if live]
        found.setdefault(row["source"], []).append(tokenizer.decode(trained, skip_special_tokens=False))
    for form, replies in expected.items():
        for text, reply in zip(found[form], replies, strict=True):
            assert text.endswith(reply + "<|im_end|>"), (form, text)
            if form not in ("anthropic", "mistral", "alpaca"):
                assert text == reply + "<|im_end|>"
