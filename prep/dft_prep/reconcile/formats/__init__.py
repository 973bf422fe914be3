"""The formats of records that are known, each a small converter to the one canonical conversation.

`reconcile` finds the one that a record has. A new format is a module here and a line in `FORMATS`.
"""

from __future__ import annotations

from dft_prep.reconcile.converters import MEDIA_FIELDS
from dft_prep.reconcile.formats.alpaca import ALPACA
from dft_prep.reconcile.formats.anthropic import ANTHROPIC
from dft_prep.reconcile.formats.chatml_text import CHATML_TEXT
from dft_prep.reconcile.formats.format import Format
from dft_prep.reconcile.formats.gemini import GEMINI
from dft_prep.reconcile.formats.mistral import MISTRAL
from dft_prep.reconcile.formats.ms_swift import MS_SWIFT
from dft_prep.reconcile.formats.openai import OPENAI
from dft_prep.reconcile.formats.preference import PREFERENCE
from dft_prep.reconcile.formats.prompt_completion import PROMPT_COMPLETION
from dft_prep.reconcile.formats.sharegpt import SHAREGPT
from dft_prep.reconcile.formats.ultrachat import ULTRACHAT
from dft_prep.reconcile.formats.xlam import XLAM

__all__ = [
    "FORMATS",
    "KNOWN_FIELDS",
    "LABEL_FIELDS",
    "SHARED_FIELDS",
    "SPECIAL_MESSAGES",
    "SYSTEM_FIELDS",
    "TOOL_FIELDS",
    "Format",
]

FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        OPENAI,
        SHAREGPT,
        ALPACA,
        PROMPT_COMPLETION,
        PREFERENCE,
        MS_SWIFT,
        ULTRACHAT,
        XLAM,
        GEMINI,
        CHATML_TEXT,
        ANTHROPIC,
        MISTRAL,
    )
}
SPECIAL_MESSAGES = (ANTHROPIC, MISTRAL)
"""Formats whose records have `messages`, as OpenAI's, and something besides that tells them."""

SYSTEM_FIELDS = ("system", "system_prompt")
TOOL_FIELDS = ("tools", "functions", "available_tools")
SHARED_FIELDS: dict[str, str] = {
    **dict.fromkeys(SYSTEM_FIELDS, "messages[].content"),
    **dict.fromkeys(TOOL_FIELDS, "tools"),
}
"""Fields that every format may have."""

LABEL_FIELDS = ("label", "kto_tag")
"""Fields that say, by a boolean, whether the reply is wanted: TRL's and ms-swift's, LLaMA-Factory's."""

KNOWN_FIELDS = frozenset(
    [
        *SHARED_FIELDS,
        *LABEL_FIELDS,
        *MEDIA_FIELDS,
        *(path.split("[")[0] for form in FORMATS.values() for path in form.fields),
    ]
)
"""Top-level fields that any format reads, or tells itself by."""
