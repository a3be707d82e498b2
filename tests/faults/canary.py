"""F-canary: unique strings in places that must stay private, and a search of everything that came out."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path


def canaries(count: int) -> list[str]:
    """Return strings that occur nowhere else."""
    return [f"canary{secrets.token_hex(12)}" for _ in range(count)]


def leaks(canary_words: Iterable[str], outputs: Mapping[str, str], folders: Iterable[Path] = ()) -> list[str]:
    """Return where a canary shows: the names of outputs and files under `folders`."""
    words = list(canary_words)
    texts = dict(outputs)
    for folder in folders:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                texts[str(file)] = file.read_bytes().decode("utf-8", "replace")
    return [f"{word} in {name}" for name, text in texts.items() for word in words if word in text]
