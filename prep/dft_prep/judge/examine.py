"""One raw record -> what a build would make of it: judged, and with a tokenizer rendered. The one way there is.

Called by `work` (build) and `survey` (validate), so that "good" means that the build will take it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from dft_common.records import Conversation, Finding
from dft_prep.codes.severities import Severities
from dft_prep.codes.table import CODES
from dft_prep.judge.judgement import Judge, first_error, record_finding
from dft_prep.judge.ngrams import Ngrams
from dft_prep.reconcile.converters import quoted
from dft_prep.shards.split import conversation_key
from dft_prep.sources.readers import RawRecord
from dft_prep.sources.units import Unit

if TYPE_CHECKING:
    from dft_prep.encode.batch import BatchEncoder
    from dft_prep.template.render import Rendered

_NO_ROWS: list[Rendered] = []
_NO_KEY = (0, 0)


class Good(msgspec.Struct):
    """A record that a build takes."""

    conversation: Conversation
    notes: list[Finding]
    """Warnings and infos: they do not leave it out."""
    rows: list[Rendered]
    """Empty without a tokenizer."""
    key: tuple[int, int]
    """`conversation_key`; (0, 0) without a tokenizer."""


class Examiner:
    """Examines the records of one unit."""

    def __init__(self, unit: Unit, severities: Severities, contamination: Ngrams, encoder: BatchEncoder | None) -> None:
        """encoder: None without a tokenizer."""
        self.judge = Judge(unit.file.shown, unit.reading, severities)
        self._contamination = contamination if len(contamination) else None
        self._encoder = encoder

    def __call__(self, raw: RawRecord) -> Good | Finding:
        """A finding leaves the record out. Raises DataError where a mask is not what inference would have generated."""
        judged = self.judge(raw)
        if isinstance(judged, Finding):
            return judged
        conversation, notes = judged.conversation, judged.notes
        if self._contamination is not None and (shared := self._contamination.find(conversation)) is not None:
            index, words = shared
            found = f"shares {quoted(words)} with a file of --decontaminate"
            self.judge.note(notes, raw, "contaminated", judged.place(index, "content"), found)
            if bad := first_error(notes):
                return bad
        if self._encoder is None:
            return Good(conversation, notes, _NO_ROWS, _NO_KEY)
        return self._rendered(self._encoder, conversation, notes, raw)

    def _rendered(
        self, encoder: BatchEncoder, conversation: Conversation, notes: list[Finding], raw: RawRecord
    ) -> Good | Finding:
        # Here, so that a validation without a tokenizer starts without them.
        from dft_prep.encode.batch import CHECKED_ONE_IN
        from dft_prep.encode.checks import check_conversation
        from dft_prep.template.render import RenderRefusal

        try:
            rows = encoder.renderer.rows(conversation)
        except RenderRefusal as refusal:
            shown = self.judge.shown
            return record_finding(raw, shown, refusal.code, refusal.path, refusal.message, severity="error")
        for code in dict.fromkeys(note for rendered in rows for note in rendered.notes):
            self.judge.note(notes, raw, code, "$", CODES[code].meaning)
        if notes and (bad := first_error(notes)):
            return bad
        key = conversation_key(conversation)
        if key[0] % CHECKED_ONE_IN == 0:
            check_conversation(encoder.renderer, encoder, conversation)
        return Good(conversation, notes, rows, key)
