"""Parts of the artefact `kvtuner.table` that record how it was found; none of them is needed to serve it.

All are optional in schema 1: a table without them is one that was chosen without a search.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from collections.abc import Sequence
from itertools import groupby
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Bits = Literal[16, 8, 4, 2]
Pair = tuple[int, int]
"""(key bits, value bits)."""

Choice = Pair | tuple[str, str]
"""What a layer stores: bits of a packed page, or names of a key codec and a value codec."""

SHA256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(min_length=1, max_length=256)]
Count = Annotated[int, Field(ge=0, le=1 << 53)]
Positive = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]

_PAIR = re.compile(r"k(16|8|4|2)v(16|8|4|2)")
_RUN = re.compile(rf"(?:([1-9][0-9]{{0,3}})x)?{_PAIR.pattern}")
_NAME = r"[a-z0-9][a-z0-9._-]{0,63}"
_NAMED_RUN = re.compile(rf"([1-9][0-9]{{0,3}})x({_NAME})/({_NAME})")
MAX_CANARY = 8192
CANARY_PLACES = 512
"""Positions of a canary whose log-probabilities are kept: 1 KiB in a table, which travels in the engine's flags."""


class Part(BaseModel):
    """Base of all parts: frozen, strict, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Measured(Part):
    """Teacher-forced quality against the model's own distributions; errors of the prefill included.

    Attributes:
        data: what text it was.
        data_sha256: of its token ids (little-endian int64), all texts joined.
        positions: next-token distributions compared.
        kl: mean KL divergence in nats.
        standard_error: of `kl`, from the spread between positions.
        top1_agreement: share of positions with the same most likely token.
    """

    data: Name
    data_sha256: SHA256
    positions: Annotated[int, Field(ge=1)]
    kl: Positive
    standard_error: Positive
    top1_agreement: Share


class Accuracy(Part):
    """Task accuracy with its 95 % Wilson interval."""

    task: Name
    correct: Count
    items: Annotated[int, Field(ge=1)]
    low: Share
    high: Share


class Point(Part):
    """A table beside this one.

    Attributes:
        pairs: `write_pairs` of its layers, e.g. "3xk8v4 27xk4v4".
        sink_tokens: its first tokens at 16 bits.
        bytes_per_token: real, all layers and KV heads.
        kl: mean KL in nats on the search text.
    """

    pairs: Annotated[str, Field(min_length=4, max_length=16384)]
    sink_tokens: Annotated[int, Field(ge=0, le=16)]
    bytes_per_token: Annotated[int, Field(ge=1)]
    kl: Positive

    @model_validator(mode="after")
    def _readable(self) -> Point:
        read_pairs(self.pairs)
        return self


class Search(Part):
    """How the table was found.

    Attributes:
        sampler: `nsga2`, `moead`, or `dp` where the programme's own solution was measured only.
        seed, trials, evaluations: trials asked for; evaluations of the model that they took.
        budget_bytes: bytes per token that no candidate exceeds.
        groups: layers that shared one choice.
        objective: quality of this table on the text that the search saw.
        validation: quality on text that it did not see, on which the finalists were ranked.
        accuracy: of this table, then of the unquantised model, per task; may be empty.
        neighbours: the next smaller and next larger tables of the front.
        uniform: the best uniform pair of no greater size, or None if none is that small.
    """

    sampler: Literal["dp", "nsga2", "moead"]
    seed: int
    trials: Count
    evaluations: Count
    budget_bytes: Annotated[int, Field(ge=1)]
    groups: list[list[Annotated[int, Field(ge=0)]]]
    objective: Measured
    validation: Measured | None = None
    accuracy: list[Accuracy] = []
    neighbours: list[Point] = []
    uniform: Point | None = None


class Sizes(Part):
    """Size of the cache that the table asks for, at the block size of its source.

    Attributes:
        nominal_bits: plain mean of key and value bits (the paper's "equivalent precision").
        real_bits: per element, with scales, zeros and sink area.
        bytes_per_token: all layers and KV heads.
    """

    nominal_bits: Positive
    real_bits: Positive
    bytes_per_token: Annotated[int, Field(ge=1)]


class Canary(Part):
    """A sample that tells whether table, codec and model still belong together.

    Attributes:
        tokens: base64 of little-endian uint32 token ids of one text.
        kl: mean KL of the table on it, nats, in float32 with exact attention.
        standard_error: of `kl`.
        nll: mean negative log-likelihood of its tokens in the unquantised model, nats: tells which model it was.
        log_likelihoods: base64 of little-endian float16, the log-probability that the unquantised model gives to the
            token at each of `places` after all before it: what an engine is compared with.
        effect: mean absolute difference that the table makes to them, nats; both are there or neither.
    """

    tokens: Annotated[str, Field(min_length=8, max_length=6 * MAX_CANARY)]
    kl: Positive
    standard_error: Positive
    nll: Positive | None = None
    log_likelihoods: Annotated[str, Field(max_length=4 * CANARY_PLACES)] | None = None
    effect: Positive | None = None

    @model_validator(mode="after")
    def _readable(self) -> Canary:
        if len(self.ids) < 2:
            raise ValueError("the canary needs two tokens or more")
        if (self.log_likelihoods is None) != (self.effect is None):
            raise ValueError("the canary has one of log_likelihoods and effect without the other")
        if self.log_likelihoods is not None:
            found, wanted = self.exact, len(self.places)
            if len(found) != wanted or not all(-65504 <= number <= 0 for number in found):
                raise ValueError(f"the canary's log-likelihoods are not {wanted} numbers of at most 0")
        return self

    @property
    def ids(self) -> list[int]:
        """Token ids of the sample."""
        try:
            data = base64.b64decode(self.tokens, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError("the canary's tokens are not base64") from error
        if len(data) % 4 or len(data) > 4 * MAX_CANARY:
            raise ValueError(f"the canary holds {len(data)} bytes; allowed are 4 per token, {MAX_CANARY} tokens")
        return list(struct.unpack(f"<{len(data) // 4}I", data))

    @property
    def places(self) -> range:
        """Positions of `log_likelihoods`, at most `CANARY_PLACES`, evenly over the sample; the first token has none."""
        length = len(self.ids)
        return range(1, length, -(-(length - 1) // CANARY_PLACES))

    @property
    def exact(self) -> list[float]:
        """Log-probabilities at `places` in the unquantised model."""
        try:
            data = base64.b64decode(self.log_likelihoods or "", validate=True)
            return list(struct.unpack(f"<{len(data) // 2}e", data))
        except (binascii.Error, ValueError, struct.error) as error:
            raise ValueError("the canary's log-likelihoods are not base64 of float16") from error

    @classmethod
    def of(
        cls,
        ids: Sequence[int],
        kl: float,
        standard_error: float,
        nll: float | None = None,
        rows: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> Canary:
        """Make a canary of token ids and what was measured on them.

        `rows` are log-probabilities of tokens 1, 2, ... in the unquantised model and with the table.
        """
        text = base64.b64encode(struct.pack(f"<{len(ids)}I", *ids)).decode("ascii")
        made = cls(tokens=text, kl=kl, standard_error=standard_error, nll=nll)
        if rows is None:
            return made
        exact, stored = ([max(-65504.0, min(0.0, row[place - 1])) for place in made.places] for row in rows)
        effect = sum(abs(one - other) for one, other in zip(exact, stored, strict=True)) / len(exact)
        packed = base64.b64encode(struct.pack(f"<{len(exact)}e", *exact)).decode("ascii")
        return cls(**{**made.model_dump(), "log_likelihoods": packed, "effect": effect})


def write_pairs(pairs: Sequence[Choice]) -> str:
    """Write what all layers store in runs, e.g. "k8v8 3xk8v4 26xk4v4", or "1xfp8/fp8 29xint8/int4" for named codecs."""
    words = []
    for choice, run in groupby(pairs):
        count = sum(1 for _ in run)
        named = isinstance(choice[0], str)
        words.append(f"{count}x" * (named or count > 1) + write_choice(choice))
    return " ".join(words)


def write_choice(choice: Choice) -> str:
    """Write one layer's, e.g. "k8v4" or "fp8/int4"."""
    key, value = choice
    return f"{key}/{value}" if isinstance(key, str) else f"k{key}v{value}"


def read_pairs(text: str) -> list[Choice]:
    """Return what `write_pairs` wrote. Raises ValueError for anything else."""
    pairs: list[Choice] = []
    for word in text.split(" "):
        if match := _RUN.fullmatch(word):
            pairs += [(int(match[2]), int(match[3]))] * int(match[1] or 1)
        elif match := _NAMED_RUN.fullmatch(word):
            pairs += [(match[2], match[3])] * int(match[1])
        else:
            raise ValueError(f"{word[:32]!r} is not a run of pairs such as 3xk8v4")
    return pairs
