"""Reflection markers as data: `markers.yaml`, by family of models (paper, appendix E)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jettison.hooks.files import read_document


@lru_cache(maxsize=1)
def _content() -> dict[str, Any]:
    content: dict[str, Any] = read_document(Path(__file__).with_name("markers.yaml"))
    return content


def families() -> tuple[str, ...]:
    """Names of the families, `auto` first."""
    return tuple(_content()["families"])


def markers_of(choice: str | Sequence[str]) -> tuple[str, ...]:
    """The markers of a family, or the given ones.

    Raises:
        KeyError: there is no such family.
    """
    if not isinstance(choice, str):
        return tuple(choice)
    family = _content()["families"][choice]
    languages = _content()["languages"]
    return tuple(dict.fromkeys([word for name in family["languages"] for word in languages[name]] + family["markers"]))


@lru_cache(maxsize=64)
def compile_markers(markers: tuple[str, ...]) -> tuple[re.Pattern[str], int]:
    """A pattern that matches at the start of a line that begins with a marker, and the characters that it may need.

    A line may begin with up to three spaces (four are code) and an emphasis sign.
    """
    words = "|".join(
        re.escape(word) + (r"(?![A-Za-z0-9_-])" if re.search(r"[A-Za-z0-9_]$", word) else "")
        for word in sorted(markers, key=len, reverse=True)
    )
    return re.compile(rf"( {{0,3}})(?:\*\*|\*|_)?(?:{words})"), max(map(len, markers)) + 6
