"""Request policies in vLLM: one logits processor for both of its model runners.

`--logits-processors jettison.hooks.vllm.policies:PolicyProcessor`. A policy sees the tokens of its own request and may
force the next ones. Whatever it does wrong ends with that request: the policy is switched off, the fault is counted and
logged once, and every other row of the batch keeps its bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

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
from jettison.hooks.vllm.live_policy import FOR_EVER, LivePolicy, Parked, admit
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
        self.awake_for = np.zeros(self.states.max_num_reqs if self.states is not None else 0, dtype=bool)
        drafts = vllm_config.speculative_config
        self.step_tokens = 1 + (drafts.num_speculative_tokens if drafts is not None else 0)
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
            else:
                # NOTES: a freed row that another moves into is not announced as removed.
                self.parked.put(displaced)

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
        if self._may_sleep(ctx):
            self.sleeping -= 1
            return logits
        if ctx is None:
            live, rows_of = self.live, _one_each
        else:
            live = _present(self.live, ctx.idx_mapping_np)
            rows_of = _rows_of(ctx, logits.shape[0])
            self._catch_up(live)
        rows, tokens = _forced(live, rows_of, logits.shape[0])
        self.sleeping = min((policy.steps_to_sleep(self.step_tokens) for policy in live.values()), default=FOR_EVER)
        self.awake_for[:] = False
        if ctx is not None:
            self.awake_for[ctx.idx_mapping_np] = True
        return _force(logits, rows, tokens) if rows else logits

    def _may_sleep(self, ctx: LogitsContext | None) -> bool:
        """Whether no policy in this step can be due. Runner V1 announces every change of its batch, V2 does not."""
        return self.sleeping > 0 and (ctx is None or bool(self.awake_for[ctx.idx_mapping_np].all()))

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


def _present(live: dict[int, LivePolicy], idx_mapping: np.ndarray[Any, Any]) -> dict[int, LivePolicy]:
    """The live policies by place in this step's batch; `live` is by slot."""
    slots = np.fromiter(live, dtype=idx_mapping.dtype, count=len(live))
    places = np.flatnonzero(np.isin(idx_mapping, slots))
    return {int(place): live[int(idx_mapping[place])] for place in places}


class _Rows(Protocol):
    def __call__(self, place: int) -> tuple[int, int]:
        """The first row of the logits that belongs to a place in the batch, and how many do."""


def _one_each(place: int) -> tuple[int, int]:
    return place, 1


def _rows_of(ctx: LogitsContext, num_rows: int) -> _Rows:
    """Where each request's rows are: one each, or with speculative decoding one more per draft token."""
    if num_rows == len(ctx.idx_mapping_np):
        return _one_each
    firsts = np.flatnonzero(ctx.expanded_local_pos[:num_rows].cpu().numpy() == 0)
    counts = np.diff(firsts, append=num_rows)
    return lambda place: (int(firsts[place]), int(counts[place]))


def _forced(live: dict[int, LivePolicy], rows_of: _Rows, num_rows: int) -> tuple[list[int], list[int]]:
    """Rows and what is forced there. A row after a draft token counts only if that token is taken, and where tokens
    are forced only the forced ones are."""
    rows: list[int] = []
    tokens: list[int] = []
    for place, policy in live.items():
        first, count = rows_of(place)
        if first + count <= num_rows:
            forced = policy.next_forced(count)
            rows += range(first, first + len(forced))
            tokens += forced
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
