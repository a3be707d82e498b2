"""Prometheus counters of the proxy and of the verifier client, in a registry of the caller's choice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from jettison.hooks.errors import EnvironmentRefused

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

Fault = Literal["timeout", "connection", "status", "shape", "breaker", "queue"]
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Metrics:
    """What is counted.

    Attributes:
        requests: by `outcome`: `trimmed`, `whole` (watched, nothing fired), `passed` (not watched).
        passed: requests not watched, by `reason`.
        stopped: thinking ended, by `rule` and `force`; with `shadow` "true" it only would have been.
        calls, errors, latency: of the verifier; errors by `reason`, latency in seconds.
        late_tokens: tokens that the upstream had sent on when the cut was made, and that were thrown away.
        saved_tokens: estimate: the mean thinking of requests on which nothing fired, less the thinking at a cut. It
            says too little where the long requests are the ones that are cut; `jettison trimr replay` measures.
        failures: continuations that could not be made; the request then ends where it was.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        try:
            from prometheus_client import CollectorRegistry, Counter, Histogram
        except ImportError as error:
            raise EnvironmentRefused(
                "package 'prometheus-client' is not installed", do="pip install 'jettison[think]'"
            ) from error
        registry = registry if registry is not None else CollectorRegistry()
        self.registry = registry
        self._wholes, self._mean = 0, 0.0
        self.requests = Counter("jettison:trim_requests", "Requests.", ["outcome"], registry=registry)
        self.passed = Counter("jettison:trim_passed", "Requests not watched.", ["reason"], registry=registry)
        self.stopped = Counter(
            "jettison:thoughts_stopped", "Thinking ended early.", ["rule", "force", "shadow"], registry=registry
        )
        self.calls = Counter("jettison:verifier_calls", "Checks sent to the verifier.", ["kind"], registry=registry)
        self.errors = Counter("jettison:verifier_errors", "Checks without an answer.", ["reason"], registry=registry)
        self.latency = Histogram(
            "jettison:verifier_latency_seconds", "Of an answered check.", buckets=SECONDS, registry=registry
        )
        self.late_tokens = Counter("jettison:late_tokens", "Thrown away at cuts.", registry=registry)
        self.saved_tokens = Counter("jettison:tokens_saved", "Estimate.", registry=registry)
        self.failures = Counter(
            "jettison:continuation_failures", "Cuts that could not be continued.", ["reason"], registry=registry
        )

    def whole(self, thinking_tokens: int) -> None:
        """Count the thinking of a request on which nothing fired."""
        self._wholes += 1
        self._mean += (thinking_tokens - self._mean) / self._wholes

    def saved(self, thinking_tokens: int) -> None:
        """Estimate what a cut at this many thinking tokens saved."""
        self.saved_tokens.inc(max(0.0, self._mean - thinking_tokens))

    def text(self) -> bytes:
        """Return the exposition format."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)
