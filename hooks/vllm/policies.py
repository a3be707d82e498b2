"""Request policies in vLLM: one logits processor for both of its model runners.

`--logits-processors jettison.hooks.vllm.policies:PolicyProcessor`. A policy sees the tokens of its own request and may
force the next ones. Whatever it does wrong ends with that request: the policy is switched off, the fault is counted and
logged once, and every other row of the batch keeps its bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jettison.hooks.errors import EnvironmentRefused
from jettison.hooks.vllm.compat import (
    BatchUpdate,
    LogitsContext,
    LogitsProcessorV1,
    LogitsProcessorV2,
    LogitsProcRequestState,
    MoveDirectionality,
    SamplingParams,
    VllmConfig,
)
from jettison.hooks.vllm.engine import Engine, engine_for, host
from jettison.hooks.vllm.entry import require_registered
from jettison.hooks.vllm.live_policy import LivePolicy, Parked, admit
from jettison.hooks.vllm.serving import describe

require_registered()


class PolicyProcessor(LogitsProcessorV1, LogitsProcessorV2):
    """Asks the hook `request_policy` per request and forces what the policies want.

    vLLM builds it with `(vllm_config, device, is_pin_memory)` in runner V1 and `(vllm_config, req_states)` in V2.

    Raises:
        JettisonError: the engine's options are missing or refused.
    """

    def __init__(self, vllm_config: VllmConfig, second: Any, is_pin_memory: bool | None = None) -> None:
        engine = engine_for(vllm_config)
        if engine is None:
            raise EnvironmentRefused(
                "the logits processor of Jettison is configured without any Jettison option",
                do="remove it from --logits-processors or add a 'jettison' section to --additional-config",
            )
        self.engine: Engine = engine
        self.enabled = engine.has_policies
        self.vocab_size = int(vllm_config.model_config.get_vocab_size())
        self.live: dict[int, LivePolicy] = {}
        self.parked = Parked()
        self.states: LogitsProcRequestState | None = None if is_pin_memory is not None else second
        self.staged: dict[int, SamplingParams] = {}
        self.sleeping = 0
        if engine.active.implementers("serving"):
            engine.active.hook.serving(serving=describe(vllm_config))

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Have every plugin that a request names check its `extra_args`, in the engine's front end.

        Raises:
            JettisonError: a plugin refuses them; a server answers with status 400.
        """
        params = sampling_params.extra_args or {}
        plugins = host().plugins if params else {}
        for name in params.keys() & plugins.keys():
            if plugins[name].hook is not None:
                plugins[name].hook.check_request(params=params)

    def is_argmax_invariant(self) -> bool:
        """Never: forcing a token changes the greedy choice."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Runner V1: follow the rows of the batch. vLLM's order is removed, added, moved."""
        if batch_update is None or not self.enabled:
            return
        self.sleeping = 0
        for row in batch_update.removed:
            self.parked.put(self.live.pop(row, None))
        for row, params, prompt, output in batch_update.added:
            self.parked.put(self.live.pop(row, None))
            policy = self.parked.take(output)
            if policy is None:
                policy = self._admit(params, prompt or (), output)
            if policy is not None:
                self.live[row] = policy
        for source, target, direction in batch_update.moved:
            moved, displaced = self.live.pop(source, None), self.live.pop(target, None)
            if moved is not None:
                self.live[target] = moved
            if displaced is not None and direction is MoveDirectionality.SWAP:
                self.live[source] = displaced

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Runner V2: a request enters slot `req_idx`; its prompt can be read only after `apply_staged_writes`."""
        self.live.pop(req_idx, None)
        self.staged.pop(req_idx, None)
        self.sleeping = 0
        if self.enabled:
            self.staged[req_idx] = sampling_params
        return self.enabled

    def apply_staged_writes(self) -> None:
        """Runner V2: ask the plugins about the requests that entered since the last step."""
        if not self.staged or self.states is None:
            return
        for slot, params in self.staged.items():
            length = int(self.states.prompt_len.np[slot])
            prompt = self.states.all_token_ids.gpu[slot, :length].tolist()
            policy = self._admit(params, prompt, [])
            if policy is not None:
                policy.slot = slot
                self.live[slot] = policy
        self.staged.clear()

    def apply(self, logits: Tensor, ctx: LogitsContext | None = None) -> Tensor:
        """Force tokens where a policy says so; without one, return `logits` untouched.

        Args:
            logits: [rows, vocabulary].
            ctx: the batch in runner V2, None in V1.
        """
        if not self.live:
            return logits
        if self.sleeping > 0:
            # NOTES: a step samples one token per request at most, so nobody can be due before that many steps.
            self.sleeping -= 1
            return logits
        if ctx is None:
            live = self.live
        else:
            live = _rows_of(self.live, ctx.idx_mapping_np)
            self._catch_up(live)
        rows, tokens = _forced(live, logits.shape[0])
        # NOTES: in runner V2 a request that sits this step out may be one token further than is known.
        unseen = 1 if ctx is None else 2
        self.sleeping = min(policy.steps_to_sleep() for policy in self.live.values()) - unseen
        return _force(logits, rows, tokens) if rows else logits

    def _admit(self, params: SamplingParams, prompt: Sequence[int], output: list[int]) -> LivePolicy | None:
        extra = params.extra_args or {}
        return admit(self.engine.active, extra, prompt, output, self.vocab_size, params.max_tokens)

    def _catch_up(self, live: dict[int, LivePolicy]) -> None:
        """Copy the tokens sampled since the last step to the host: one copy for the whole batch, rarely more."""
        if not live or self.states is None:
            return
        slots = torch.tensor([policy.slot for policy in live.values()], device=self.states.device)
        totals = self.states.total_len.gpu[slots].long()
        newest = self.states.all_token_ids.gpu[slots, (totals - 1).clamp_min(0)]
        pairs: list[list[int]] = torch.stack((totals, newest.long()), 1).tolist()
        for policy, (total, last) in zip(live.values(), pairs, strict=True):
            known = policy.prompt_len + len(policy.output)
            if total == known + 1:
                policy.output.append(last)
            elif total > known:
                policy.output += self.states.all_token_ids.gpu[policy.slot, known:total].tolist()


def _rows_of(live: dict[int, LivePolicy], idx_mapping: np.ndarray[Any, Any]) -> dict[int, LivePolicy]:
    """The live policies by row of this step; `live` is by slot."""
    slots = np.fromiter(live, dtype=idx_mapping.dtype, count=len(live))
    rows = np.flatnonzero(np.isin(idx_mapping, slots))
    return {int(row): live[int(idx_mapping[row])] for row in rows}


def _forced(live: dict[int, LivePolicy], num_rows: int) -> tuple[list[int], list[int]]:
    rows: list[int] = []
    tokens: list[int] = []
    for row, policy in live.items():
        token = policy.next_token() if row < num_rows else None
        if token is not None:
            rows.append(row)
            tokens.append(token)
    return rows, tokens


def _force(logits: Tensor, rows: list[int], tokens: list[int]) -> Tensor:
    """Leave one possible token in each row, unless a grammar or a ban of the user has already excluded it."""
    index = torch.tensor(rows, device=logits.device)
    token = torch.tensor(tokens, device=logits.device)
    allowed = logits[index, token] != float("-inf")
    forced = torch.full((len(rows), logits.shape[1]), float("-inf"), dtype=logits.dtype, device=logits.device)
    forced.scatter_(1, token[:, None], 0.0)
    logits[index] = torch.where(allowed[:, None], forced, logits[index])
    return logits
