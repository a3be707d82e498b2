"""Options of the section `kvtuner`: a measured table, or one pair for all layers."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field, model_validator

from jettison.hooks.config import PluginOptions
from jettison.plugins.kvtuner.table import Pair, Table, load_table

_PAIR = re.compile(r"k(16|8|4|2)v(16|8|4|2)")


class KVTunerOptions(PluginOptions):
    """Exactly one of `table` and `pair`.

    Attributes:
        table: content of a table made by `jettison kvtuner sensitivity` (`--with kvtuner=table.json` inlines it).
        pair: the same bits in every layer, "k8v4" for 8-bit keys and 4-bit values; 16, 8, 4 or 2 on each side.
        rotate: with `pair`: Hadamard rotation before quantising, on unless false. A table has its own.
        sink_tokens: with `pair`: first tokens of a sequence kept at 16 bits, 0 (default) to 16. A table has its own.
    """

    table: Table | None = None
    pair: Annotated[str, Field(pattern=rf"^(?:{_PAIR.pattern})$")] | None = None
    rotate: bool | None = None
    sink_tokens: Annotated[int, Field(ge=0, le=16)] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> KVTunerOptions:
        if (self.table is None) == (self.pair is None):
            found = "neither" if self.table is None else "both"
            raise ValueError(
                f"exactly one of 'table' and 'pair' is needed, found {found}; "
                "write --with kvtuner=table.json or --with kvtuner=k8v4"
            )
        if self.table is not None and (self.rotate is not None or self.sink_tokens is not None):
            raise ValueError("'rotate' and 'sink_tokens' are for 'pair' only: a table has its own")
        if self.table is not None:
            self.table.format(0)
        return self

    @property
    def uniform(self) -> Pair | None:
        """(key bits, value bits) of `pair`, or None."""
        match = _PAIR.fullmatch(self.pair) if self.pair is not None else None
        return (int(match[1]), int(match[2])) if match else None

    @classmethod
    def from_flag(cls, value: str) -> dict[str, Any]:
        """Turn VALUE of `--with kvtuner=VALUE` into the section: a pair such as k8v4, or the path of a table.

        Raises:
            InputRefused: the file is missing, malformed or not a valid table.
        """
        if _PAIR.fullmatch(value):
            return {"pair": value}
        return {"table": load_table(value).content()}
