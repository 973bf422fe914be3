"""The refusals before a model is loaded: quick, in this order, each with its remedy. Called by `trainer`.

A dataset without a manifest and a shard of the wrong size are found by `dft_common`; here: a model that cannot
be found, attention that is not installed, a tokenizer that means something else than the dataset's, a vocabulary
that does not fit, a length that the model was not made for.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from dft_common.errors import DataError, SetupError
from dft_common.fingerprint import describe_difference, load_tokenizer_json, tokenizer_fingerprint, tokenizer_meaning
from dft_common.manifest import Manifest
from dft_common.schema import TEMPLATE_NAME, TOKENIZER_DIR
from dft_train.data.collate import FLASH
from dft_train.ranks import launch
from dft_train.settings.arguments import Settings
from dft_train.settings.deepspeed_config import choose_precision, read_deepspeed
from dft_train.settings.lora_flags import base_of_adapter

TOKENIZER_JSON = "tokenizer.json"
_OTHER_TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "spiece.model", "tekken.json")


def check_output_dir(output_dir: Path) -> None:
    """Raises SetupError where nothing can be written there, which a run would otherwise learn when it is over. A full
    disk is not looked at: room may come. Makes nothing."""
    there = next(path for path in (output_dir.absolute(), *output_dir.absolute().parents) if path.exists())
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return
    why = "it cannot be written to (permissions, or a read-only file system)" if there.is_dir() else "it is a file"
    raise SetupError(
        f"--output_dir {output_dir}: {'' if there == output_dir.absolute() else f'{there}: '}{why}",
        remedy="give a directory that this user can write to; it is made where it is not there",
    )


def load_config(settings: Settings) -> Any:
    """The model's configuration. Raises SetupError where there is no such model."""
    from transformers import AutoConfig

    name = base_of_adapter(settings.model_name_or_path) or settings.model_name_or_path
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not Path(name).is_dir():
        raise SetupError(
            f"--model_name_or_path {name}: there is no such directory",
            remedy="give a directory with a config.json and weights, or a hub id as ORG/NAME",
        )
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise SetupError(
            f"--model_name_or_path {name}: its configuration cannot be loaded: {first}",
            remedy="give a directory with a config.json and weights, or a hub id that this machine can reach",
        ) from None


def _model_class(config: Any) -> Any:
    """The class that AutoModelForCausalLM makes of `config`, None where the model brings its own code."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if hasattr(config, "auto_map"):
        return None
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def _in_16_bits(settings: Settings, config: Any) -> bool:
    """Whether the model is going to compute in 16 bits."""
    path = settings.training.get("deepspeed")
    if any(choose_precision(settings.training, settings.torch_dtype, read_deepspeed(path) if path else None)):
        return True
    found = getattr(config.get_text_config(), "dtype", None) if settings.torch_dtype == "auto" else settings.torch_dtype
    return str(found).removeprefix("torch.") in ("bfloat16", "float16")


def _check_flash(settings: Settings, config: Any, model_class: Any) -> None:
    """Raise SetupError where flash-attn is missing, or could not compute this run."""
    if importlib.util.find_spec("flash_attn") is None:
        raise SetupError(
            "--attn_implementation flash_attention_2: flash-attn is not installed",
            remedy="run `pip install 'dft-toolkit[gpu]'`, or use `--attn_implementation sdpa`",
        )
    if not getattr(model_class, "_supports_flash_attn", True):
        raise SetupError(
            f"--attn_implementation flash_attention_2: transformers' {model_class.__name__} does not work with it",
            remedy="use `--attn_implementation sdpa`",
        )
    if not _in_16_bits(settings, config):
        raise SetupError(
            "--attn_implementation flash_attention_2 takes 16 bits alone, and this run computes in float32",
            remedy="add `--bf16 True`, or use `--attn_implementation sdpa`",
        )


def choose_attention(settings: Settings, config: Any) -> str:
    """The attention to use. Raises SetupError where a GPU run asks for one that cannot be."""
    wanted = settings.attn_implementation
    if wanted == FLASH and not launch.has_accelerator():
        launch.warn("flash_attention_2 needs a GPU and there is none: sdpa is used in its place")
        wanted = "sdpa"
    model_class = _model_class(config)
    if wanted == "sdpa" and not getattr(model_class, "_supports_sdpa", True):
        launch.warn("%s does not work with sdpa attention: eager is used in its place", model_class.__name__)
        return "eager"
    if wanted == FLASH:
        _check_flash(settings, config, model_class)
    return wanted


def _cached(name: str, file: str) -> Path | None:
    """A file of the model's, local or from the hub; None where it has none."""
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(name, file)
    except OSError:
        return None
    return Path(found) if found else None


def model_tokenizer(settings: Settings) -> dict[str, Any] | None:
    """The model's tokenizer as a parsed tokenizer.json, None where it comes without one."""
    name = settings.model_name_or_path
    if path := _cached(name, TOKENIZER_JSON):
        return load_tokenizer_json(path)
    if not any(_cached(name, file) for file in _OTHER_TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=settings.trust_remote_code)
        return json.loads(tokenizer.backend_tokenizer.to_str())
    except (OSError, ValueError, ImportError, AttributeError) as error:
        launch.warn("the model's tokenizer cannot be read: %s", str(error).splitlines()[0])
        return None


def _without_added(meaning: dict[str, Any], added: list[str], theirs: dict[str, Any]) -> dict[str, Any]:
    """`meaning` less what the build added; what is in `theirs` too stays, to be compared."""
    out = dict(meaning)
    for part in ("vocabulary", "added_tokens"):
        new = set(added) - theirs[part].keys()
        out[part] = {content: value for content, value in meaning[part].items() if content not in new}
    return out


def check_tokenizer(settings: Settings, dataset_dir: Path, manifest: Manifest) -> None:
    """Raise DataError where the dataset's ids mean other text to the model than they did to the build."""
    theirs = model_tokenizer(settings)
    if theirs is None:
        launch.warn(
            "%s has no tokenizer files, so it cannot be compared with the dataset's", settings.model_name_or_path
        )
        return
    if tokenizer_fingerprint(theirs) == manifest.tokenizer.fingerprint:
        return
    path = dataset_dir / TOKENIZER_DIR / TOKENIZER_JSON
    if not path.is_file():
        raise DataError(f"{path}: missing", remedy="build the dataset again; its tokenizer directory is part of it")
    meaning = tokenizer_meaning(theirs)
    ours = _without_added(tokenizer_meaning(load_tokenizer_json(path)), manifest.tokenizer.added_tokens, meaning)
    lines = describe_difference(ours, meaning, ("the dataset", "the model"))
    if lines:
        shown = "\n  ".join(lines)
        raise DataError(
            f"{dataset_dir}: the dataset was tokenized with another tokenizer than the model's:\n  {shown}",
            remedy=f"run `dft-prep build --data_files ... --tokenizer {settings.model_name_or_path} "
            f"--output_dir {dataset_dir} --overwrite`",
        )


def check_vocabulary(settings: Settings, manifest: Manifest, config: Any) -> None:
    """Raise DataError where an id of the dataset has no row in the model's embedding, and none is to be added."""
    rows = config.get_text_config().vocab_size
    needed = manifest.tokenizer.vocab_size
    if needed > rows and not manifest.tokenizer.added_tokens:
        raise DataError(
            f"the dataset's tokenizer has {needed:,} ids, {settings.model_name_or_path} has embeddings for {rows:,}",
            remedy=f"build the dataset with `--tokenizer {settings.model_name_or_path}`",
        )


def check_length(max_length: int, config: Any) -> None:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit and max_length > limit:
        launch.warn(
            "packs hold up to %s tokens, the model was made for positions up to %s: a longer conversation is beyond it",
            f"{max_length:,}",
            f"{limit:,}",
        )


def _model_template(name: str) -> str | None:
    if path := _cached(name, TEMPLATE_NAME):
        return path.read_text("utf-8")
    if path := _cached(name, "tokenizer_config.json"):
        template = json.loads(path.read_bytes()).get("chat_template")
        return template if isinstance(template, str) else None
    return None


def check_template(settings: Settings, dataset_dir: Path) -> None:
    """Warn where the model brings another chat template than the one that the dataset was rendered with."""
    path = dataset_dir / TOKENIZER_DIR / TEMPLATE_NAME
    theirs = _model_template(settings.model_name_or_path)
    if theirs is not None and path.is_file() and theirs.strip() != path.read_text("utf-8").strip():
        launch.warn(
            "the dataset was rendered with another chat template than the model's: the dataset's goes into checkpoints"
        )
