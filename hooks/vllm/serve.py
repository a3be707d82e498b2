"""vLLM's own subcommand `serve`, for installations whose program `vllm` does not start: see `compose.runnable`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `vllm serve` with these arguments (default: of this process)."""
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm", description="vLLM CLI")
    commands = parser.add_subparsers(required=True, dest="subparser")
    for command in cmd_init():
        command.subparser_init(commands).set_defaults(run=command.cmd, check=command.validate)
    args = parser.parse_args(["serve", *(sys.argv[1:] if arguments is None else arguments)])
    args.check(args)
    args.run(args)


if __name__ == "__main__":
    main()
