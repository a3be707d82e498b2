"""The canary in a running server: does the engine err no more on the sample than the table did when it was made?

One request with the sample as its prompt returns what the engine gives each token; the table keeps what the unquantised
model gave it in float32, and how far the table moved that (`artefact.Canary`). Sizes are compared, not the errors
themselves: an engine in 16 bits rounds some keys to other codes, and layer by layer its errors become another draw.

Where prompts attend to stored keys and values (CPU), this tests the codec. Where they attend to keys and values before
they are stored (CUDA, but for earlier chunks of a long prompt), it tests the checkpoint, and `quantises` may be false
of an engine that does use the table: `jettison_status` says what is in force. Other weights are seen where they move
the sample by more than the table does; `canary.verify`, which loads the checkpoint, sees 0.01 nats per token.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from jettison.hooks.errors import ConfigError, EnvironmentRefused, InputRefused
from jettison.plugins.kvtuner.artefact import Canary
from jettison.plugins.kvtuner.canary import check_sample
from jettison.plugins.kvtuner.table import Table

NOISE = 0.05
"""Nats per token that 16-bit arithmetic may add: bfloat16 logits between 16 and 32 lie 1/8 apart, which alone moves a
log-probability by 1/32 in the mean."""

RELATIVE = 0.25
"""Share of the table's own effect by which it may be exceeded: the mean of another draw over at most 512 positions."""

MAX_BYTES = 1 << 26


@dataclass(frozen=True)
class EngineVerdict:
    """Means over positions of the absolute difference of log-probabilities from the unquantised model's, nats.

    Attributes:
        effect: of the table, when it was made.
        found: of the engine.
        limit: what `found` may be.
        places: positions compared; tokens: of the sample that were sent.
    """

    effect: float
    found: float
    limit: float
    places: int
    tokens: int

    @property
    def holds(self) -> bool:
        """Whether the engine is no further from the unquantised model than the table, within the tolerances."""
        return self.found <= self.limit

    @property
    def quantises(self) -> bool | None:
        """Whether the engine errs at least half as much as the table; None where 16-bit arithmetic may do so too."""
        return self.found >= self.effect / 2 if self.effect > 2 * NOISE else None

    @property
    def content(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "holds": self.holds, "quantises": self.quantises}

    def check(self, table: Table) -> None:
        """Raise InputRefused unless the verdict holds."""
        if not self.holds:
            raise InputRefused(
                f"the engine differs from the model that the table of {table.model.name!r} was made for by "
                f"{self.found:.4f} nats per token, the table by {self.effect:.4f} when it was made",
                allowed=f"allowed is {self.limit:.4f}",
                do="serve the checkpoint and the table that belong together, or make a new table",
            )


def verdict(canary: Canary, found: Sequence[float | None]) -> EngineVerdict:
    """Compare log-probabilities `found` of the sample's first tokens (the first has none) with the stored ones.

    Raises:
        EnvironmentRefused: there are none.
    """
    pairs = zip(canary.places, canary.exact, strict=True)
    differences = [
        abs(exact - here) for place, exact in pairs if place < len(found) and (here := found[place]) is not None
    ]
    if not differences or canary.effect is None:
        raise EnvironmentRefused("the engine returned no log-probabilities of the sample", do="serve a longer context")
    mean = sum(differences) / len(differences)
    limit = (1 + RELATIVE) * canary.effect + NOISE
    return EngineVerdict(canary.effect, mean, limit, len(differences), len(found))


def verify_server(table: Table, url: str, *, timeout: float = 300.0) -> EngineVerdict:
    """Send the sample of `table` to the OpenAI-compatible vLLM server at `url` and compare.

    A key is taken from the environment variable VLLM_API_KEY, as the server does. A sample longer than the server's
    context is cut. A difference raises nothing: see `EngineVerdict.check`.

    Raises:
        InputRefused: the table has no canary, or one without log-probabilities.
        ConfigError: `url` is not http or https.
        EnvironmentRefused: the server does not answer as vLLM does.
    """
    canary = check_sample(table)
    if canary.log_likelihoods is None:
        raise InputRefused(
            f"the canary of the table of {table.model.name!r} has no log-probabilities to compare an engine with",
            do="make the table with jettison kvtuner search, or verify it against the checkpoint",
        )
    if urlsplit(url).scheme not in ("http", "https"):
        raise ConfigError(f"{url!r} is no address", allowed="allowed is http://HOST:PORT or https://HOST:PORT")
    base = url.rstrip("/").removesuffix("/v1")
    try:
        served = _ask(f"{base}/v1/models", None, timeout)["data"][0]
        ids = canary.ids[: max(2, int(served.get("max_model_len") or len(canary.ids) + 1) - 1)]
        body = {"model": served["id"], "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        answer = _ask(f"{base}/v1/completions", body, timeout)
        rows = answer["choices"][0]["prompt_logprobs"]
        found = [None if row is None else float(row[str(own)]["logprob"]) for own, row in zip(ids, rows, strict=True)]
    except (OSError, URLError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise EnvironmentRefused(
            f"{base} does not answer as a vLLM server ({type(error).__name__}: {error})",
            do="start one with jettison serve MODEL --with kvtuner=TABLE",
        ) from error
    return verdict(canary, found)


def _ask(url: str, body: dict[str, Any] | None, timeout: float) -> Any:
    key = os.environ.get("VLLM_API_KEY")
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    data = None if body is None else json.dumps(body).encode()
    request = Request(url, data=data, headers=headers)  # noqa: S310  the caller has checked the scheme
    with urlopen(request, timeout=timeout) as response:  # noqa: S310  likewise
        return json.loads(response.read(MAX_BYTES))
