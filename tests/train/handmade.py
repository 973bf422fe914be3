"""A small dataset, tokenizer and models, written by hand: an independent copy of the dataset's contract.

Nothing here calls the code that prepares data; it writes what DESIGN.md says a dataset is.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dft_common import manifest as m
from dft_common.fingerprint import hash_file, hash_object, load_tokenizer_json, tokenizer_fingerprint
from dft_common.packs import PackIndexInfo
from dft_common.reader import Row
from dft_common.schema import PACK_SCHEMA, row_schema, shard_name

END = "<|im_end|>"
CONTROL = ("<|endoftext|>", "<|im_start|>", END)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB = 256 + len(CONTROL)
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""A configuration of two layers, with weights so large that attention matters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation:
    ids: list[int]
    mask: list[bool]
    source: str
    weights: list[float] | None = None


def write_tokenizer(directory: Path, *, added: tuple[str, ...] = ()) -> Path:
    """A byte-level tokenizer without merges: ids 0 to 255 are bytes, then the control tokens."""
    directory.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: at for at, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*CONTROL, *added)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": CONTROL[0]}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def chat(tokenizer: Tokenizer, turns: list[tuple[str, str]], source: str, weight: float | None = None) -> Conversation:
    """ChatML; the assistant's text and its end-of-turn token are trained."""
    ids: list[int] = []
    mask: list[bool] = []

    def put(text: str, trained: bool) -> None:
        new = tokenizer.encode(text, add_special_tokens=False).ids
        ids.extend(new)
        mask.extend([trained] * len(new))

    for role, text in turns:
        put(f"<|im_start|>{role}\n", False)
        put(text + END, role == "assistant")
        put("\n", False)
    weights = None if weight is None else [weight if live else 0.0 for live in mask]
    return Conversation(ids=ids, mask=mask, source=source, weights=weights)


def conversations(tokenizer: Tokenizer, count: int, *, seed: int = 0, weighted: bool = False) -> list[Conversation]:
    """Small sums from two sources; with `weighted`, every third has a weight of 0.5."""
    random = np.random.default_rng(seed)
    made = []
    for at in range(count):
        a, b = random.integers(0, 50, 2)
        turns = [("user", f"{a}+{b}"), ("assistant", str(a + b))]
        if at % 4 == 0:
            turns += [("user", "and one more?"), ("assistant", str(a + b + 1))]
        made.append(chat(tokenizer, turns, ("sums", "more")[at % 2], 0.5 if weighted and at % 3 == 0 else None))
    return made


def _write_shard(path: Path, rows: list[Conversation]) -> None:
    schema = row_schema("int32")
    columns = [
        [row.ids for row in rows],
        [row.mask for row in rows],
        [row.source for row in rows],
        [hash_object([row.ids, at])[:16] for at, row in enumerate(rows)],
        [row.weights for row in rows],
    ]
    arrays = [pa.array(column, type=field.type) for column, field in zip(columns, schema, strict=True)]
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
        for start in range(0, len(rows), 7):
            writer.write_batch(batch.slice(start, 7))


def _write_split(directory: Path, rows: list[Conversation], shards: int) -> m.SplitInfo:
    directory.mkdir()
    infos = []
    for at, part in enumerate(np.array_split(np.arange(len(rows)), shards)):
        name = shard_name(at, shards)
        chosen = [rows[number] for number in part]
        _write_shard(directory / name, chosen)
        infos.append(
            m.ShardInfo(
                name=name,
                rows=len(chosen),
                tokens=sum(len(row.ids) for row in chosen),
                trained_tokens=sum(sum(row.mask) for row in chosen),
                bytes=(directory / name).stat().st_size,
                checksum=hash_file(directory / name),
            )
        )
    return m.SplitInfo(
        rows=len(rows),
        tokens=sum(info.tokens for info in infos),
        trained_tokens=sum(info.trained_tokens for info in infos),
        longest=max((len(row.ids) for row in rows), default=0),
        shards=infos,
    )


def live_labels(row: Conversation, start: int, end: int) -> int:
    weights = row.weights or [1.0] * len(row.ids)
    return sum(row.mask[at] and weights[at] > 0 for at in range(start + 1, end))


def first_fit(rows: list[Conversation], max_length: int, packing: bool) -> list[list[tuple[int, int, int]]]:
    packs: list[list[tuple[int, int, int]]] = []
    room: list[int] = []
    for number, row in enumerate(rows):
        length = min(len(row.ids), max_length)
        at = next((at for at, left in enumerate(room) if packing and left >= length), None)
        if at is None:
            packs.append([])
            room.append(max_length)
            at = len(packs) - 1
        packs[at].append((number, 0, length))
        room[at] -= length
    return packs


def write_index(
    out: Path,
    split: str,
    rows: list[Conversation],
    fingerprint: str,
    *,
    max_length: int,
    packing: bool = True,
    block: int = 3,
) -> PackIndexInfo:
    """A first-fit index; every `block` packs are called a block of their own, so that shuffling has some to move."""
    packs = first_fit(rows, max_length, packing)
    lives = [[live_labels(rows[row], start, end) for row, start, end in pack] for pack in packs]
    name = f"{split}-{max_length}-{hash_object([max_length, packing])[:8]}.arrow"
    path = out / "packs" / name
    columns: list[Any] = [[[piece[at] for piece in pack] for pack in packs] for at in range(3)]
    columns += [lives, [at // block for at in range(len(packs))]]
    arrays = [pa.array(column, type=field.type) for column, field in zip(columns, PACK_SCHEMA, strict=True)]
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, PACK_SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=PACK_SCHEMA))
    info = PackIndexInfo(
        name=name,
        split=split,
        max_length=max_length,
        overlong="truncate",
        packing=packing,
        seed=42,
        dataset_fingerprint=fingerprint,
        packs=len(packs),
        slices=sum(len(pack) for pack in packs),
        tokens=sum(end - start for pack in packs for _, start, end in pack),
        live=sum(sum(pack) for pack in lives),
        left_out={},
        lost={},
        bytes=path.stat().st_size,
        checksum=hash_file(path),
    )
    path.with_suffix(".json").write_bytes(m.encode_json(info))
    return info


def write_dataset(
    out: Path,
    train: list[Conversation],
    validation: list[Conversation],
    *,
    max_length: int = 64,
    packing: bool = True,
    shards: int = 2,
    added: tuple[str, ...] = (),
    end_of_turn: str | None = END,
) -> Path:
    """A complete dataset in `out`. `added`: tokens that the build gave the tokenizer; their ids are the last."""
    out.mkdir(parents=True)
    (out / "packs").mkdir()
    write_tokenizer(out / "tokenizer", added=added)
    splits = {
        "train": _write_split(out / "train", train, shards),
        "validation": _write_split(out / "validation", validation, 1),
    }
    fingerprint = hash_object([shard.checksum for split in splits.values() for shard in split.shards])
    for name, rows in (("train", train), ("validation", validation)):
        write_index(out, name, rows, fingerprint, max_length=max_length, packing=packing)
    tokenizer = load_tokenizer_json(out / "tokenizer" / "tokenizer.json")
    manifest = m.Manifest(
        format_version=1,
        toolkit_version="0",
        libraries={},
        recipe={"max_length": max_length, "overlong": "truncate", "packing": packing, "seed": 42},
        recipe_fingerprint="0",
        fingerprint=fingerprint,
        token_dtype="int32",
        encoder="tokenizers",
        tokenizer=m.TokenizerInfo(
            fingerprint=tokenizer_fingerprint(tokenizer),
            vocab_size=VOCAB + len(added),
            eos_token=END,
            pad_token=CONTROL[0],
            added_tokens=list(added),
        ),
        template=m.TemplateInfo(
            fingerprint=hash_object(TEMPLATE),
            origin="tokenizer",
            end_of_turn=end_of_turn,
            generation_prompt="<|im_start|>assistant\n",
            checks={},
        ),
        sources=[
            m.SourceInfo(name=name, files=[], counts=m.Counts(), ignored_fields={})
            for name in sorted({row.source for row in [*train, *validation]})
        ],
        counts=m.Counts(),
        warnings={},
        splits=splits,
    )
    m.write_manifest(out, manifest)
    return out


def read_state(run: Path) -> dict[str, Any]:
    return msgspec.json.decode((run / "trainer_state.json").read_bytes())


def write_model(directory: Path, architecture: str, *, vocab: int = VOCAB, seed: int = 0, **more: Any) -> Path:
    """A model of two layers with random weights, and the tokenizer beside it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    ids = {"bos_token_id": None, "eos_token_id": 256, "pad_token_id": 256}
    own = {"vocab_size": vocab, "intermediate_size": 64, "max_position_embeddings": 512, "initializer_range": 0.2}
    config = AutoConfig.for_model(architecture, **{**SMALL, **ids, **own, **more})
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, attn_implementation="eager").save_pretrained(directory)
    return write_tokenizer(directory)


def random_rows(lengths: Sequence[int], *, ids: tuple[int, int] = (0, 64), seed: int = 3) -> list[Row]:
    """Rows of random ids (from the first up to the second of `ids`), a good half of them trained."""
    random = np.random.default_rng(seed)
    return [
        Row(
            input_ids=random.integers(*ids, length).astype(np.int32),
            assistant_masks=random.random(length) < 0.6,
            source="s",
            id="0",
            loss_weights=None,
        )
        for length in lengths
    ]
