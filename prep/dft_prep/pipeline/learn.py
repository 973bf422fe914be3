"""Learn template and encoder, and check them on what is to be built, before the work begins.

Called by `build`, `validate.command` and `preview`, so that a validation fails where a build would.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from itertools import islice

from dft_common.manifest import TemplateInfo
from dft_common.records import Conversation
from dft_prep.encode.batch import BatchEncoder
from dft_prep.encode.checks import self_check
from dft_prep.encode.encoders import ReferenceEncoder, choose_encoder
from dft_prep.judge.judgement import Judge, Judged
from dft_prep.recipe import Recipe
from dft_prep.sources.files import FileError
from dft_prep.sources.readers import UnitReader
from dft_prep.sources.units import Unit
from dft_prep.template.render import Renderer

_SAMPLED_PER_SOURCE = 20
_SAMPLED_SOURCES = 20


def sample(units: Sequence[Unit]) -> list[Conversation]:
    """The first good conversations of each source. units: of every source, in order."""
    firsts: dict[str, Unit] = {}
    for unit in units:
        firsts.setdefault(unit.source, unit)
    found: list[Conversation] = []
    for unit in islice(firsts.values(), _SAMPLED_SOURCES):
        # What cannot be read is told when its turn comes.
        with contextlib.suppress(FileError):
            for judged in map(Judge("", unit.reading), islice(UnitReader(unit), _SAMPLED_PER_SOURCE)):
                if isinstance(judged, Judged):
                    found.append(judged.conversation)
    return found


def learn(recipe: Recipe, sample: Sequence[Conversation], wanted_encoder: str) -> tuple[BatchEncoder, TemplateInfo]:
    """Choose the encoder and check template and tokenizer on probes and on `sample`. Raises DataError."""
    renderer = Renderer(recipe.template.source, recipe.tokenizer, recipe.date, recipe.render_options)
    reference = ReferenceEncoder(recipe.tokenizer)
    texts = [message.content or "" for conversation in sample for message in conversation.messages]
    engine = choose_encoder(wanted_encoder, recipe.tokenizer, reference, texts)
    encoder = BatchEncoder(renderer, recipe.tokenizer, engine, reference)
    checks = self_check(renderer, encoder, sample)
    template = TemplateInfo(
        fingerprint=recipe.template.fingerprint,
        origin=recipe.template.origin,
        end_of_turn=renderer.end_of_turn,
        generation_prompt=renderer.prompts[0] if renderer.prompts else "",
        checks=checks,
    )
    return encoder, template
