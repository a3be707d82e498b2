"""The worker extension: refuses at start-up what would otherwise run without us, and says what is in force.

`--worker-extension-cls jettison.hooks.vllm.worker.JettisonWorker`. vLLM imports it in every worker, which is what makes
it a check: vLLM logs and ignores a plugin whose import fails, and one that `VLLM_PLUGINS` leaves out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from jettison.hooks.status import status
from jettison.hooks.vllm.engine import engine_for, record
from jettison.hooks.vllm.entry import require_registered

if TYPE_CHECKING:
    from jettison.hooks.vllm.compat import VllmConfig

require_registered()


class JettisonWorker:
    """A base class that vLLM adds to its own worker class; no name of it clashes with one of the worker's."""

    def __new__(cls, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Self:
        """Refuse an engine that the options do not fit, before the worker is built.

        Raises:
            JettisonError: the options, the installation or the engine are refused.
        """
        engine = engine_for(vllm_config)
        if engine is None:
            record(vllm_config, None)
        return super().__new__(cls)

    def jettison_status(self) -> dict[str, Any]:
        """What is in force in this worker, JSON-ready; call it through `collective_rpc("jettison_status")`."""
        answer = status()
        rank = getattr(self, "rank", None)
        return answer | {"process": answer["process"] | {"rank": rank}}
