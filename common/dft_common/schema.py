"""The format of the dataset on disk: names, column types, constants. The one owner of each.

Written by `dft_prep.shards.writer` and `dft_prep.shards.pack`, read through `dft_common.reader`, checked by
`dft_prep.verify`. A change here is a change of format: raise `FORMAT_VERSION` and say so in CHANGELOG.md.
"""

from __future__ import annotations

from typing import Any, Literal

import pyarrow as pa

FORMAT_VERSION = 1
IGNORE_INDEX = -100
"""The label of a token that is not trained. Labels are made in the collator, and shifted by the loss."""

TRAIN = "train"
VALIDATION = "validation"
SPLITS = (TRAIN, VALIDATION)

MANIFEST_NAME = "manifest.json"
DATASET_DICT_NAME = "dataset_dict.json"
QUARANTINE_NAME = "quarantine.jsonl"
REPORT_NAME = "report.json"
WORK_DIR = ".work"
PACKS_DIR = "packs"
TOKENIZER_DIR = "tokenizer"
TEMPLATE_NAME = "chat_template.jinja"

TokenDtype = Literal["int32", "uint16"]
ROWS_PER_BATCH = 1000
"""Rows of one Arrow record batch in a shard: what `datasets` itself writes."""


def row_schema(token_dtype: TokenDtype) -> pa.Schema:
    """Columns of a stored row (one conversation, never truncated).

    input_ids: token ids; assistant_masks: True where the token is trained; source: the source's name;
    id: 16 hex digits of the conversation's content hash; loss_weights: one float a token, or null where every
    trained token counts 1.
    """
    ids = pa.int32() if token_dtype == "int32" else pa.uint16()
    return pa.schema(
        [
            ("input_ids", pa.list_(ids)),
            ("assistant_masks", pa.list_(pa.bool_())),
            ("source", pa.string()),
            ("id", pa.string()),
            ("loss_weights", pa.list_(pa.float32())),
        ]
    )


def datasets_features(token_dtype: TokenDtype) -> dict[str, Any]:
    """The `features` of dataset_info.json, in the spelling that old and new `datasets` both read."""

    def sequence(dtype: str) -> dict[str, Any]:
        return {"feature": {"dtype": dtype, "_type": "Value"}, "_type": "Sequence"}

    text = {"dtype": "string", "_type": "Value"}
    return {
        "input_ids": sequence(token_dtype),
        "assistant_masks": sequence("bool"),
        "source": text,
        "id": text,
        "loss_weights": sequence("float32"),
    }


PACK_SCHEMA = pa.schema(
    [
        ("rows", pa.list_(pa.uint32())),
        ("starts", pa.list_(pa.int32())),
        ("ends", pa.list_(pa.int32())),
        ("lives", pa.list_(pa.int32())),
        ("block", pa.int32()),
    ]
)
"""One row of a pack index is one pack: its slices (row of the split, start, end, live labels) and the block it is from.

`lives[i]` counts the labels of slice i that are trained; the first token of a slice is never a label.
"""


def shard_name(index: int, count: int) -> str:
    """`data-00000-of-00008.arrow`, the name that `datasets` gives its shards."""
    return f"data-{index:05d}-of-{count:05d}.arrow"
