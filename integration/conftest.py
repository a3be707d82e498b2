"""Models that several tests need, made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def scripted_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of `scripted`."""
    import scripted

    return scripted.learn(tmp_path_factory.mktemp("scripted"))


@pytest.fixture(scope="session")
def scripted_tokenizer(scripted_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(scripted_model)
