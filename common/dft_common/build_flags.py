"""The flags of `dft-prep build`, which `dft-train --data_files` takes too and hands on.

Kept here because neither stage imports the other. No flag is listed before it does something.
"""

from __future__ import annotations

from dft_common.flags import Flag

TOKENIZER = Flag(
    name="tokenizer",
    aliases=("model_name_or_path",),
    help="Directory or hub id of the tokenizer (a model's directory will do).",
)
CHAT_TEMPLATE = Flag(
    name="chat_template",
    help="A .jinja file, or `chatml`. Default: the tokenizer's own.",
)
ADD_CHATML_TOKENS = Flag(
    name="add_chatml_tokens",
    kind="bool",
    default=False,
    help="Add <|im_start|> and <|im_end|> to a base model's tokenizer; dft-train then resizes the embeddings.",
)
DATA_FILES = Flag(
    name="data_files",
    kind="list",
    default=(),
    help="Files, globs, directories or fsspec URLs; each argument is one source, NAME=PATH names it.",
)
WORKERS = Flag(
    name="preprocessing_num_workers", kind="int", minimum=1, help="Processes. Default: every core this process may use."
)
TRAIN_ON = Flag(
    name="train_on",
    choices=("all", "last"),
    default="all",
    help="`all` assistant turns (a message's weight 0 makes it context), or only the `last`.",
)
UNROLL_TURNS = Flag(
    name="unroll_turns",
    kind="bool",
    default=False,
    help="One row for each trained turn, rendered as inference would have seen it (templates that rewrite history).",
)
CHAT_TEMPLATE_KWARGS = Flag(
    name="chat_template_kwargs",
    kind="json",
    help="Variables for the template, as inference will give them: '{\"enable_thinking\": false}'.",
)
UNSUPPORTED_TOOLS = Flag(
    name="unsupported_tools",
    choices=("text", "quarantine", "error"),
    default="text",
    help="What becomes of a tool call that the template would drop.",
)
TEMPLATE_DATE = Flag(
    name="template_date", help="What strftime_now prints, as YYYY-MM-DD. Default: the day of the build's first start."
)
SPECIAL_TOKENS_IN_TEXT = Flag(
    name="special_tokens_in_text",
    choices=("encode", "quarantine", "error"),
    default="encode",
    help="A message that holds the text of a control token: `encode` it as plain text, or leave it out.",
)
MAX_LENGTH = Flag(
    name="max_length",
    aliases=("cutoff_len", "sequence_len"),
    kind="int",
    default=8192,
    minimum=2,
    help="Tokens of a pack. For the pack index only; stored rows are whole.",
)
OVERLONG = Flag(
    name="overlong",
    choices=("truncate", "split", "drop", "error"),
    default="truncate",
    help="A row longer than --max_length: keep its start, cut it into slices, leave it out, or stop.",
)
PACKING = Flag(name="packing", kind="bool", default=True, help="False: one conversation a pack.")
SEED = Flag(name="seed", kind="int", default=42, minimum=0, help="Of the validation split and of the packs' order.")

ERROR = Flag(
    name="error",
    metavar="CODE",
    kind="list",
    default=(),
    help="Codes of findings that leave a record out (`dft-prep explain` lists them).",
)
WARN = Flag(name="warn", metavar="CODE", kind="list", default=(), help="Codes of findings that are warnings.")
IGNORE = Flag(name="ignore", metavar="CODE", kind="list", default=(), help="Codes of findings that are not reported.")

DECONTAMINATE = Flag(
    name="decontaminate",
    kind="list",
    default=(),
    help="Files of conversations or plain text, benchmarks say: records that share 13 words in a row are left out.",
)

SEVERITY_FLAGS = (ERROR, WARN, IGNORE)
TOKENIZER_FLAGS = (TOKENIZER, CHAT_TEMPLATE, ADD_CHATML_TOKENS)
RENDER_FLAGS = (TRAIN_ON, UNROLL_TURNS, CHAT_TEMPLATE_KWARGS, UNSUPPORTED_TOOLS, SPECIAL_TOKENS_IN_TEXT, TEMPLATE_DATE)
PACK_FLAGS = (MAX_LENGTH, OVERLONG, PACKING, SEED)

BUILD_FLAGS = (
    DATA_FILES,
    *TOKENIZER_FLAGS,
    Flag(name="output_dir", help="Directory of the dataset."),
    *PACK_FLAGS,
    *RENDER_FLAGS,
    Flag(
        name="on_error",
        choices=("quarantine", "stop"),
        default="quarantine",
        help="A bad record: write it to quarantine.jsonl and go on, or stop at the first.",
    ),
    *SEVERITY_FLAGS,
    DECONTAMINATE,
    Flag(
        name="max_bad_fraction",
        kind="float",
        default=0.01,
        minimum=0,
        maximum=1,
        help="With more bad records in a source than this fraction and --max_bad_records both allow, the build fails.",
    ),
    Flag(name="max_bad_records", kind="int", default=10, minimum=0, help="See --max_bad_fraction."),
    Flag(name="deduplicate", kind="bool", default=True, help="Leave out exact duplicates, within and across sources."),
    Flag(
        name="validation_split_percentage",
        kind="float",
        default=2.0,
        minimum=0,
        maximum=100,
        help="Percent of conversations, by content hash: a conversation stays on one side for ever.",
    ),
    WORKERS,
    Flag(
        name="encoder",
        choices=("auto", "fastokens", "tokenizers"),
        default="auto",
        help="`auto`: fastokens where it agrees with tokenizers on every check, else tokenizers.",
    ),
    Flag(name="shard_size", default="512MB", help="Bytes of a shard, as 512MB or 1GB."),
    Flag(name="resume", kind="bool", default=True, help="An interrupted build goes on; False starts over."),
    Flag(
        name="overwrite",
        kind="bool",
        default=False,
        help="Replace a complete dataset of another recipe.",
    ),
    Flag(
        name="token_dtype",
        choices=("int32", "uint16"),
        default="int32",
        help="uint16 halves the size where the vocabulary has at most 65,536 tokens.",
    ),
)
