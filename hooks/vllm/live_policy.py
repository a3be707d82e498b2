"""One request's policy while it runs: when it is asked, what it may force, and how its faults end."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, overload

from jettison.hooks.status import status
from jettison.hooks.types import Request, RequestPolicy

if TYPE_CHECKING:
    from jettison.hooks.host import Active

MAX_FORCED = 65_536
MAX_PARKED = 1_024
FOR_EVER = 1 << 40


class ReadOnlyTokens(Sequence[int]):
    """The engine's own list of token ids, without a way to change it; slices are copies."""

    __slots__ = ("_tokens",)

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[int, ...]: ...
    def __getitem__(self, index: int | slice) -> int | tuple[int, ...]:
        found = self._tokens[index]
        return tuple(found) if isinstance(found, Sequence) else found

    def __len__(self) -> int:
        return len(self._tokens)

    def __iter__(self) -> Iterator[int]:
        return iter(tuple(self._tokens))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self._tokens) == tuple(other)

    def __hash__(self) -> int:
        return id(self)


class LivePolicy:
    """Asks one policy as its output grows, and holds what it forces.

    Attributes:
        owner: names of the plugins that may have made the policy, for the fault count.
        output: the request's output token ids; the engine (or, in runner V2, the processor) appends to it.
        prompt_len: tokens before the first output token.
        slot: the request's slot in runner V2.
    """

    def __init__(self, owner: str, policy: RequestPolicy, output: list[int], prompt_len: int, vocab_size: int) -> None:
        self.owner = owner
        self.output = output
        self.prompt_len = prompt_len
        self.slot = -1
        self._policy: RequestPolicy | None = policy
        self._seen = ReadOnlyTokens(output)
        self._vocab_size = vocab_size
        self._asked_at = -1
        self._queue: tuple[int, ...] = ()
        self._checked = 0

    def next_token(self) -> int | None:
        """The id to force for the token about to be sampled, or None to sample freely."""
        return next(iter(self.next_forced(1)), None)

    def next_forced(self, rows: int) -> tuple[int, ...]:
        """The ids to force for the tokens about to be sampled, at most `rows`; empty to sample freely.

        vLLM may sample the same position again (a partial prefill throws its token away), so the answer depends on
        the position alone, and the policy is asked once per position, or once per step where a step samples several.
        """
        if self._policy is None:
            return ()
        position = len(self.output)
        if self._asked_at >= 0:
            offset = position - self._asked_at
            if not self._obeyed(offset):
                self.switch_off("a forced token was overruled by the engine")
                return ()
            if 0 <= offset < max(1, len(self._queue)):
                return self._queue[offset : offset + rows]
        self._ask(position)
        return self._queue[:rows]

    def steps_to_sleep(self, most: int = 1) -> int:
        """So many steps may pass, this one not counted, before this policy must be asked again or forces one.

        Args:
            most: tokens that a step may sample.
        """
        if self._policy is None:
            return FOR_EVER
        position = len(self.output)
        if self._queue and position < self._asked_at + len(self._queue) + 1:
            return 0
        wake_at = getattr(self._policy, "wake_at", 0)
        return max(0, (wake_at - position - 1) // most) if type(wake_at) is int else 0

    def switch_off(self, reason: str, error: BaseException | None = None) -> None:
        """End the policy for this request, and count why."""
        self._policy, self._queue = None, ()
        status.fault(self.owner, reason, error)

    def _obeyed(self, offset: int) -> bool:
        first, self._checked = self._checked, max(self._checked, min(offset, len(self._queue)))
        at = self._asked_at
        return tuple(self.output[at + first : at + self._checked]) == self._queue[first : self._checked]

    def _ask(self, position: int) -> None:
        assert self._policy is not None
        self._asked_at, self._queue, self._checked = position, (), 0
        try:
            answer = self._policy.next_tokens(self._seen)
            queue = () if answer is None else _ids(answer)
        except Exception as error:
            self.switch_off("next_tokens failed", error)
            return
        if len(queue) > MAX_FORCED:
            self.switch_off(f"next_tokens forced more than {MAX_FORCED} tokens")
        elif any(not 0 <= token < self._vocab_size for token in queue):
            self.switch_off("next_tokens forced an id outside the vocabulary")
        else:
            self._queue = queue


def _ids(answer: Sequence[int]) -> tuple[int, ...]:
    if isinstance(answer, str | bytes) or not isinstance(answer, Sequence):
        raise TypeError("next_tokens must return a sequence of token ids or None")
    return tuple(operator.index(token) for token in answer[: MAX_FORCED + 1])


def admit(
    active: Active,
    params: Mapping[str, Any],
    prompt: Sequence[int],
    output: list[int],
    vocab_size: int,
    max_tokens: int | None = None,
) -> LivePolicy | None:
    """Ask the plugins whether a request has a policy; a plugin that fails leaves the request without one."""
    owner = ", ".join(active.implementers("request_policy"))
    request = Request(None, ReadOnlyTokens(prompt), MappingProxyType(dict(params)), vocab_size, max_tokens)
    try:
        policy = active.hook.request_policy(request=request)
        fits = policy is None or callable(getattr(policy, "next_tokens", None))
    except Exception as error:
        status.fault(owner, "request_policy failed", error)
        return None
    if not fits:
        status.fault(owner, "request_policy returned an object without next_tokens")
    if policy is None or not fits:
        return None
    return LivePolicy(owner, policy, output, len(prompt), vocab_size)


class Parked:
    """Policies of requests that left the batch and may come back (preempted, or not scheduled in a step).

    vLLM's runner V1 names no request; it keeps one list of output tokens per request for its whole life, so that list
    is the key. Requests that ended stay until `MAX_PARKED` others have left.
    """

    def __init__(self) -> None:
        self._policies: OrderedDict[int, LivePolicy] = OrderedDict()

    def put(self, policy: LivePolicy | None) -> None:
        """Keep a policy; the oldest is forgotten when there are too many."""
        if policy is None:
            return
        self._policies[id(policy.output)] = policy
        if len(self._policies) > MAX_PARKED:
            self._policies.popitem(last=False)

    def take(self, output: list[int]) -> LivePolicy | None:
        """The policy of the request with this list of output tokens, if it is still known."""
        return self._policies.pop(id(output), None)
