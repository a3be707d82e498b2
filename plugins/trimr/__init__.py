"""TrimR: thinking stops when the answer has settled.

Paper: "TrimR: Verifier-based Training-Free Thinking Trimming for Efficient Test-Time Scaling", arXiv 2505.17155 (ICLR
2026). What is kept: thinking is cut at reflection markers, the end of every thought is asked for an answer, equal
answers in a row end it gently (Algorithm 1), a spent budget without agreement or a verbatim loop ends it by force
(Algorithm 2). What differs: an exact comparison of stated answers comes before any model, and a model is asked only
about what it leaves open; underthinking needs missing agreement too, as the text says and the printed algorithm does
not; loops are compared exactly; gentle guidance that the model ignores is followed by forceful.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jettison.hooks.specs import hookimpl

if TYPE_CHECKING:
    import click

    from jettison.plugins.trimr.config import TrimROptions
    from jettison.plugins.trimr.engine import TrimR


@hookimpl
def options() -> type[TrimROptions]:
    """Return the class of the section `trimr`."""
    from jettison.plugins.trimr.config import TrimROptions

    return TrimROptions


@hookimpl
def activate(options: TrimROptions) -> TrimR:
    """Return the object that gives each request of one engine its policy.

    Raises:
        EnvironmentRefused: sympy is not installed.
    """
    from jettison.plugins.trimr.engine import TrimR
    from jettison.plugins.trimr.normalise_exact import warm_up

    warm_up()
    return TrimR(options)


@hookimpl
def check_request(params: Mapping[str, Any]) -> None:
    """Refuse a request whose `trimr` argument is wrong."""
    from jettison.plugins.trimr.config import RequestOptions

    RequestOptions.from_xargs(params)


@hookimpl
def commands(cli: click.Group) -> None:
    """Add `jettison trimr`."""
    from jettison.plugins.trimr.command import trimr

    cli.add_command(trimr)
