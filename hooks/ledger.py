"""Every patch of somebody else's code. There is none: the engines are extended through their own registries.

`tests/hooks/test_ledger.py` reads the source and keeps this list complete in both directions.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Patch:
    """One assignment into a module or class that is not ours.

    Attributes:
        target: dotted name that is replaced, e.g. "vllm.config.VllmConfig.compute_hash".
        why: what does not work without it.
        upstream: the issue or pull request that would make it unnecessary.
        remove_when: the condition under which it goes.
    """

    target: str
    why: str
    upstream: str
    remove_when: str


PATCHES: tuple[Patch, ...] = ()
