from __future__ import annotations

import datetime

import pytest

import tiny
from dft_prep.encode.batch import BatchEncoder
from dft_prep.encode.encoders import ReferenceEncoder
from dft_prep.template.render import Renderer, RenderOptions
from dft_prep.tokenizer_files import TokenizerFiles, load_tokenizer

DATE = datetime.date(2026, 1, 31)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> TokenizerFiles:
    return load_tokenizer(str(tiny.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


@pytest.fixture
def make_encoder(tokenizer):
    """make_encoder(template, tokenizer=..., **render options) -> BatchEncoder on the reference engine."""

    def make(template: str, files: TokenizerFiles = tokenizer, **options) -> BatchEncoder:
        renderer = Renderer(template, files, DATE, RenderOptions(**options))
        reference = ReferenceEncoder(files)
        return BatchEncoder(renderer, files, reference, reference)

    return make
