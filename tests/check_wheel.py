"""Prove that the base install prepares a dataset: run by `make check-wheel` with the Python of a bare environment."""

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TRAINER_PACKAGES = ("torch", "transformers", "datasets", "deepspeed")


def write_tokenizer(directory: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))


def main() -> None:
    present = [name for name in TRAINER_PACKAGES if importlib.util.find_spec(name)]
    assert not present, f"the base install pulls {present}"
    command = str(Path(sys.executable).with_name("dft-prep"))
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_tokenizer(root / "tokenizer")
        messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
        lines = [json.dumps({"messages": [*messages[:1], {**messages[1], "content": str(i)}]}) for i in range(500)]
        (root / "data.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        build = [command, "build", "--data_files", root / "data.jsonl", "--tokenizer", root / "tokenizer"]
        build += ["--add_chatml_tokens", "--output_dir", root / "out", "--max_length", "256"]
        subprocess.run([str(argument) for argument in build], check=True)
        subprocess.run([command, "verify", str(root / "out")], check=True)
        manifest = json.loads((root / "out" / "manifest.json").read_text("utf-8"))
        assert manifest["counts"]["kept"] == 500, manifest["counts"]
    print("the wheel's base install built and verified a dataset without", ", ".join(TRAINER_PACKAGES))


if __name__ == "__main__":
    main()
