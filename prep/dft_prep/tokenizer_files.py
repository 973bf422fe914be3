"""The tokenizer as files: find them, read what the build needs, write them beside the dataset.

Called by `recipe`. Works from `tokenizer.json` with the `tokenizers` library alone; a SentencePiece
`tokenizer.model` is converted where the `[train]` extra (transformers) is installed.
"""

from __future__ import annotations

import functools
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from dft_common.errors import SetupError
from dft_common.fingerprint import tokenizer_fingerprint
from dft_common.schema import TEMPLATE_NAME

TOKENIZER_JSON = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
GENERATION_NAME = "generation_config.json"
TOKEN_MAP_NAME = "special_tokens_map.json"
_SIDE_FILES = (TOKEN_MAP_NAME,)
_HUB_PATTERNS = [
    TOKENIZER_JSON,
    CONFIG_NAME,
    GENERATION_NAME,
    TEMPLATE_NAME,
    "chat_template.json",
    "tokenizer.model",
    *_SIDE_FILES,
]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


@functools.lru_cache(maxsize=2)
def _parse(tokenizer_json: str) -> dict[str, Any]:
    return json.loads(tokenizer_json)


@functools.lru_cache(maxsize=2)
def _fingerprint(tokenizer_json: str) -> dict[str, str]:
    return tokenizer_fingerprint(_parse(tokenizer_json))


class ControlToken(msgspec.Struct, frozen=True, kw_only=True):
    """An added token marked `special`. `strips_left`: white space before it belongs to it; right likewise."""

    text: str
    id: int
    strips_left: bool
    strips_right: bool


class TokenizerFiles(msgspec.Struct, frozen=True, kw_only=True):
    """A tokenizer read from disk. Picklable, so that worker processes get the very same."""

    origin: str
    """What the user named."""
    tokenizer_json: str
    config: dict[str, Any]
    chat_template: str | None
    side_files: dict[str, str]
    added: tuple[str, ...] = ()
    """Control tokens that `with_chatml_tokens` added."""
    generation_stops: tuple[int, ...] = ()
    """The ids that end generation, by the `generation_config.json` beside the tokenizer: it belongs to the model, so
    that it is neither part of the fingerprint nor saved with the dataset."""

    def parsed(self) -> dict[str, Any]:
        """The parsed `tokenizer.json`; not to be changed."""
        return _parse(self.tokenizer_json)

    def fingerprint(self) -> dict[str, str]:
        return _fingerprint(self.tokenizer_json)

    def control_tokens(self) -> tuple[ControlToken, ...]:
        """Every control token, longest text first."""
        tokens = [
            ControlToken(
                text=token["content"],
                id=token["id"],
                strips_left=bool(token.get("lstrip")),
                strips_right=bool(token.get("rstrip")),
            )
            for token in self.parsed().get("added_tokens") or []
            if token.get("special") and token["content"]
        ]
        return tuple(sorted(tokens, key=lambda token: (-len(token.text), token.text)))

    def vocab_size(self) -> int:
        """Highest id plus one, added tokens included."""
        parsed = self.parsed()
        vocab = parsed["model"]["vocab"]
        last = max(vocab.values(), default=-1) if isinstance(vocab, dict) else len(vocab) - 1
        return max([last, *(token["id"] for token in parsed.get("added_tokens") or [])]) + 1

    def token_map(self) -> dict[str, Any]:
        """`special_tokens_map.json`, where transformers reads it: its tokens then win over the config's."""
        # A config with added_tokens_decoder was saved by a version that keeps all there.
        ignored = "added_tokens_decoder" in self.config
        return {} if ignored else json.loads(self.side_files.get(TOKEN_MAP_NAME, "{}"))

    def named_tokens(self) -> dict[str, str]:
        """`bos_token`, `eos_token` ... as text: the variables that a chat template may use."""
        named = {}
        values = {**self.config, **self.token_map()}
        for key in _NAMED_TOKENS:
            value = values.get(key)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                named[key] = text
        return named

    def with_chatml_tokens(self) -> TokenizerFiles:
        """This tokenizer with ChatML's two control tokens, `<|im_end|>` as its end of sequence. Raises SetupError."""
        parsed = json.loads(self.tokenizer_json)
        present = {token["content"] for token in parsed.get("added_tokens") or []}
        missing = [text for text in CHATML_TOKENS if text not in present]
        for text, token_id in self._ids_of_new(missing).items():
            parsed.setdefault("added_tokens", []).append(
                {
                    "id": token_id,
                    "content": text,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
            )
        side_files = dict(self.side_files)
        if "eos_token" in self.token_map():
            token_map = {**self.token_map(), "eos_token": CHATML_TOKENS[1]}
            side_files[TOKEN_MAP_NAME] = json.dumps(token_map, indent=2, ensure_ascii=False) + "\n"
        return msgspec.structs.replace(
            self,
            tokenizer_json=json.dumps(parsed, ensure_ascii=False),
            config={**self.config, "eos_token": CHATML_TOKENS[1]},
            side_files=side_files,
            added=tuple(missing),
        )

    def _ids_of_new(self, texts: list[str]) -> dict[str, int]:
        """The ids that `tokenizers` gives to new control tokens, whatever a file says. Raises SetupError.

        A text that stands in the model's vocabulary keeps its id; the others go on from the vocabulary's size, which
        is another token's id where the vocabulary's ids have gaps.
        """
        from tokenizers import AddedToken, Tokenizer

        tokenizer = Tokenizer.from_str(self.tokenizer_json)
        before = {number: text for text, number in tokenizer.get_vocab().items()}
        before |= {token["id"]: token["content"] for token in self.parsed().get("added_tokens") or []}
        tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in texts])
        after = tokenizer.get_vocab()
        found = {text: after[text] for text in texts}
        for text, number in found.items():
            if (other := before.get(number, text)) != text:
                raise SetupError(
                    f"--add_chatml_tokens: {text} would get id {number} of {other!r}: there are gaps among the ids",
                    remedy="give a template that does with the tokenizer's own tokens (--chat_template)",
                )
        return found

    def save(self, directory: Path, chat_template: str) -> None:
        """Write the files that `AutoTokenizer.from_pretrained` and `load_tokenizer` read."""
        directory.mkdir(parents=True, exist_ok=True)
        config = {key: value for key, value in self.config.items() if key not in ("chat_template", "auto_map")}
        (directory / TOKENIZER_JSON).write_text(self.tokenizer_json, "utf-8")
        text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
        (directory / CONFIG_NAME).write_text(text + "\n", "utf-8")
        (directory / TEMPLATE_NAME).write_text(chat_template, "utf-8")
        for name, text in self.side_files.items():
            (directory / name).write_text(text, "utf-8")


def _download(name: str) -> Path:
    if not _HUB_ID.fullmatch(name):
        raise SetupError(
            f"--tokenizer {name}: there is no such directory",
            remedy=f"give a directory that holds {TOKENIZER_JSON}, or a hub id as ORG/NAME",
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_PATTERNS))
    except Exception as error:  # the hub's client raises a dozen unrelated kinds, all of them "not available"
        raise SetupError(
            f"--tokenizer {name}: no such directory, and it cannot be fetched from the hub: {type(error).__name__}",
            remedy="check the name, the network and your access, or download it and give the directory",
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise SetupError(f"{path}: not JSON: {error}", remedy="download the tokenizer again") from None
    if not isinstance(value, dict):
        raise SetupError(f"{path}: expected a JSON object", remedy="download the tokenizer again")
    return value


def _generation_stops(directory: Path) -> tuple[int, ...]:
    path = directory / GENERATION_NAME
    if not path.is_file():
        return ()
    ids = _read_json(path).get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    # Python counts True among the numbers.
    if not all(type(item) is int for item in ids):
        raise SetupError(f"{path}: eos_token_id is no number or list of numbers", remedy="repair or remove the file")
    return tuple(ids)


def _convert_sentencepiece(directory: Path) -> str:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise SetupError(
            f"{directory}: only a SentencePiece tokenizer.model, no {TOKENIZER_JSON}",
            remedy="install the trainer's packages to convert it (`pip install 'dft-toolkit[train]'`)",
        ) from None
    with tempfile.TemporaryDirectory() as temporary:
        try:
            AutoTokenizer.from_pretrained(str(directory)).save_pretrained(temporary)
            return (Path(temporary) / TOKENIZER_JSON).read_text("utf-8")
        except Exception as error:  # whatever a damaged model makes the converter raise
            reason = f"{type(error).__name__}: {error}"
            raise SetupError(
                f"{directory}: its tokenizer.model cannot be converted: {reason[:300]}",
                remedy=f"put a {TOKENIZER_JSON} beside it",
            ) from None


def _template_text(value: Any) -> str | None:
    """A template as the config holds it: text, or a list of named ones, of which `default` is meant."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        return named.get("default")
    return None


def _find_template(directory: Path, config: dict[str, Any]) -> str | None:
    if (path := directory / TEMPLATE_NAME).is_file():
        return path.read_text("utf-8")
    if (path := directory / "chat_template.json").is_file():
        return _template_text(_read_json(path).get("chat_template"))
    return _template_text(config.get("chat_template"))


def load_tokenizer(name: str) -> TokenizerFiles:
    """Read the tokenizer in directory `name`, or of the hub id `name`. Raises SetupError with the remedy."""
    directory = Path(name).expanduser()
    if not directory.exists():
        directory = _download(name)
    if directory.is_file():
        raise SetupError(f"--tokenizer {name}: this is a file", remedy="give the directory that holds it")
    if (directory / TOKENIZER_JSON).is_file():
        text = (directory / TOKENIZER_JSON).read_text("utf-8")
    elif (directory / "tokenizer.model").is_file():
        text = _convert_sentencepiece(directory)
    else:
        raise SetupError(
            f"--tokenizer {name}: neither {TOKENIZER_JSON} nor tokenizer.model in this directory",
            remedy="give the directory of a tokenizer or of a model with its tokenizer",
        )
    _check_loads(directory, text)
    if (directory / TOKEN_MAP_NAME).is_file():
        _read_json(directory / TOKEN_MAP_NAME)
    config = _read_json(directory / CONFIG_NAME) if (directory / CONFIG_NAME).is_file() else {}
    return TokenizerFiles(
        origin=name,
        tokenizer_json=text,
        config=config,
        chat_template=_find_template(directory, config),
        side_files={
            side: (directory / side).read_text("utf-8") for side in _SIDE_FILES if (directory / side).is_file()
        },
        generation_stops=_generation_stops(directory),
    )


def _check_loads(directory: Path, text: str) -> None:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise SetupError(
            f"{directory / TOKENIZER_JSON}: the tokenizers library cannot load it: {str(error)[:300]}",
            remedy="download the tokenizer again, or upgrade the tokenizers package",
        ) from None
