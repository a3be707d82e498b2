"""F-mut: damaged documents, and the verdict on what a reader made of them.

A reader may reject with one sentence (a JettisonError) or accept what is equal in meaning to the original. Anything
else (another exception, a silent change, more than a second) is a finding.
"""

from __future__ import annotations

import copy
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from jettison.hooks.errors import JettisonError

HOSTILE_VALUES: tuple[Any, ...] = (
    None, True, False, "", "x", "8", "true", "\x00", "\ud800", 0, -1, 1, 3, 2**31, 2**63, 2**64 + 1, -0.0, 0.5, 1e308,
    float("nan"), float("inf"), [], [[]], {}, {"": ""}, ["8"] * 1000, "k" * 100_000,
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One case that a reader got wrong."""

    case: str
    verdict: str
    detail: str


def structural(document: Any, rng: random.Random) -> tuple[str, Any]:
    """Return a description and a copy of `document` with one key or value damaged, removed, repeated or swapped."""
    damaged = copy.deepcopy(document)
    places = list(_containers(damaged))
    path, place = rng.choice(places)
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    kind = rng.choice(("replace", "remove", "add", "swap", "rename"))
    if not keys or kind == "add":
        value = copy.deepcopy(rng.choice(HOSTILE_VALUES))
        if isinstance(place, dict):
            place[rng.choice(("unknown", "", "Strict", "__proto__", "x" * 1000))] = value
        else:
            place.append(value)
        return f"add {value!r:.60} at {path}", damaged
    key = rng.choice(keys)
    if kind == "remove":
        del place[key]
    elif kind == "swap" and len(keys) > 1:
        other = rng.choice(keys)
        place[key], place[other] = place[other], place[key]
    elif kind == "rename" and isinstance(place, dict):
        place[f"{key}_"] = place.pop(key)
    else:
        kind, place[key] = "replace", copy.deepcopy(rng.choice(HOSTILE_VALUES))
    return f"{kind} {path}.{key}", damaged


def _containers(value: Any, path: str = "$") -> Iterator[tuple[str, Any]]:
    if isinstance(value, (dict, list)):
        yield path, value
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _containers(item, f"{path}.{key}")


def byte_level(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Return a description and a copy of `data` with bits flipped, cut off, or with bytes that do not belong there."""
    position = rng.randrange(len(data))
    kind = rng.choice(("flip", "truncate", "bom", "nul", "insert", "repeat", "crlf"))
    if kind == "flip":
        flipped = bytearray(data)
        flipped[position] ^= 1 << rng.randrange(8)
        return f"flip a bit of byte {position}", bytes(flipped)
    mutated = {
        "truncate": data[:position],
        "bom": b"\xef\xbb\xbf" + data,
        "nul": data[:position] + b"\x00" + data[position:],
        "insert": data[:position] + bytes([rng.randrange(256)]) + data[position:],
        "repeat": data + data,
        "crlf": data.replace(b"\n", b"\r\n"),
    }[kind]
    return f"{kind} at byte {position}", mutated


def deep(levels: int = 100_000, opening: str = "[", closing: str = "]") -> str:
    """Return JSON text nested so deeply that a careless reader overflows its stack."""
    return opening * levels + closing * levels


def dump(document: Any) -> bytes:
    """Return JSON bytes, with NaN and infinity written as Python writes them and lone surrogates escaped."""
    return json.dumps(document, indent=1).encode()


def judge(
    cases: Iterator[tuple[str, bytes]], read: Callable[[bytes], Any], original: Any, *, seconds: float = 1.0
) -> tuple[Counter[str], list[Finding]]:
    """Feed every case to `read`; return how often each verdict fell, and the findings."""
    counts: Counter[str] = Counter()
    findings: list[Finding] = []
    for case, data in cases:
        started = time.perf_counter()
        verdict, detail = _verdict(read, data, original)
        if time.perf_counter() - started > seconds:
            verdict, detail = "slow", f"{time.perf_counter() - started:.2f} s"
        counts[verdict] += 1
        if verdict not in ("rejected", "equal"):
            findings.append(Finding(case, verdict, detail))
    return counts, findings


def _verdict(read: Callable[[bytes], Any], data: bytes, original: Any) -> tuple[str, str]:
    try:
        result = read(data)
    except JettisonError as error:
        text = str(error)
        return ("rejected", text) if "\n" not in text and text.endswith(".") else ("unreadable", text)
    except Exception as error:
        return "crash", f"{type(error).__name__}: {error}"
    return ("equal", "") if result == original else ("different", f"{result!r:.200}")
