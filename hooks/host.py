"""The host: finds plugins, isolates broken ones, reads their options and activates those that are asked for."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy
from pydantic import create_model

from jettison.hooks.config import OptionsTree, PluginOptions, nearest, parse_section, unknown_key
from jettison.hooks.errors import ConfigError, EnvironmentRefused, JettisonError
from jettison.hooks.specs import PROJECT, EngineHooks, PluginHooks

GROUP = "jettison.plugins"
logger = logging.getLogger("jettison")


@dataclass(frozen=True)
class PluginInfo:
    """One installed plugin. A broken one has `object` None and says why in `error`."""

    name: str
    distribution: str | None
    version: str | None
    object: Any | None = None
    error: str | None = None
    hook: Any = field(default=None, repr=False)
    """The plugin-level hooks of this plugin alone."""
    options: type[PluginOptions] | None = None


class Active:
    """The plugins that are active for one engine.

    Attributes:
        hook: pluggy relay of the engine-level hooks; call with keywords, e.g. `hook.kv_cache_format(layer=layer)`.
        names: names of the active plugins, in the order in which they are asked.
        options: the whole tree of options.
    """

    def __init__(self, options: OptionsTree, objects: Mapping[str, Any]) -> None:
        manager = pluggy.PluginManager(PROJECT)
        manager.add_hookspecs(EngineHooks)
        self.names = tuple(sorted(objects))
        for name in reversed(self.names):  # NOTES: pluggy asks the last registered first.
            _checked(EngineHooks, objects[name], name)
            manager.register(objects[name], name)
        self.options = options
        self.hook = manager.hook

    def implementers(self, hook: str) -> tuple[str, ...]:
        """Return the names of the active plugins that implement an engine-level hook."""
        return tuple(sorted(impl.plugin_name for impl in getattr(self.hook, hook).get_hookimpls()))

    def report(self) -> dict[str, dict[str, Any]]:
        """Return each reporting plugin's report by name; one that fails reports its error instead."""
        reports: dict[str, dict[str, Any]] = {}
        for impl in self.hook.report.get_hookimpls():
            try:
                answer: Any = impl.function()
                reports[impl.plugin_name] = dict(answer)
            except Exception as error:  # a report must never take the engine down
                reports[impl.plugin_name] = {"error": f"{type(error).__name__} in report()"}
        return dict(sorted(reports.items()))


class Host:
    """All installed plugins of one entry-point group.

    Attributes:
        plugins: every plugin found, broken ones included, by name in alphabetical order.
    """

    def __init__(self, plugins: Mapping[str, PluginInfo]) -> None:
        self.plugins: Mapping[str, PluginInfo] = dict(sorted(plugins.items()))

    @classmethod
    def discover(cls, strict: bool = False, group: str = GROUP) -> Host:
        """Load the plugins of `group`; each broken one gives one named warning, with `strict` an error."""
        return cls.of(_load(group), strict=strict)

    @classmethod
    def of(cls, plugins: Iterable[PluginInfo], *, strict: bool = False) -> Host:
        """Return a host of these plugins, warning of (or, with `strict`, refusing) broken ones."""
        host = cls({info.name: info for info in plugins})
        for info in host.broken:
            if strict:
                raise _broken(info)
            logger.warning("%s It is left out.", _broken(info))
        return host

    @property
    def broken(self) -> list[PluginInfo]:
        """The plugins that cannot be used."""
        return [info for info in self.plugins.values() if info.error is not None]

    @cached_property
    def options_type(self) -> type[OptionsTree]:
        """The pydantic class of the whole section, e.g. for a JSON Schema."""
        fields: dict[str, Any] = {
            info.name: (info.options | None, None) for info in self.plugins.values() if info.options is not None
        }
        return create_model("Options", __base__=OptionsTree, **fields)

    def parse(self, section: Mapping[str, Any]) -> OptionsTree:
        """Return the options tree of a `jettison` section.

        Raises:
            ConfigError: an unknown key (with the nearest known one) or a bad value.
            EnvironmentRefused: the section asks for a broken plugin, or is strict and any plugin is broken.
        """
        strict = section.get("strict", False)
        if not isinstance(strict, bool):
            raise ConfigError(f"option 'strict' = {strict!r} is refused", allowed="allowed are true and false")
        if strict and self.broken:
            raise _broken(self.broken[0])
        values: dict[str, Any] = {"strict": strict}
        for name in section:
            if name != "strict":
                values[name] = parse_section(self.options_of(name), name, section[name])
        return self.options_type(**values)

    def options_of(self, name: object) -> type[PluginOptions]:
        """Return the options class of a plugin; JettisonError if it is unknown, broken or has none."""
        info = self.plugins.get(name) if isinstance(name, str) else None
        if info is None:
            what = f"no plugin named {name!r} is installed (section {name!r})"
            raise unknown_key(str(name), [*self.plugins, "strict"], what=what)
        if info.error is not None:
            raise _broken(info)
        if info.options is None:
            raise ConfigError(f"plugin {info.name!r} has no options: it only adds commands", do="remove its section")
        return info.options

    def activate(self, section: Mapping[str, Any]) -> Active:
        """Activate, for one engine, the plugins that have a section.

        Raises:
            JettisonError: as `parse`, or a plugin refuses its options, fails, or returns an object with bad hooks.
        """
        tree = self.parse(section)
        objects = {name: self._activate(name, options) for name, options in tree.sections().items()}
        return Active(tree, objects)

    def _activate(self, name: str, options: PluginOptions) -> Any:
        try:
            engine_object = self.plugins[name].hook.activate(options=options)
        except JettisonError:
            raise
        except Exception as error:
            raise EnvironmentRefused(
                f"plugin {name!r} failed to activate ({_reason(error)})",
                do=f"correct its options or remove section {name!r}",
            ) from error
        if engine_object is None:
            raise EnvironmentRefused(f"activate() of plugin {name!r} returned None", do="return the object with hooks")
        return engine_object


def _load(group: str) -> list[PluginInfo]:
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=group):
        claims = found.setdefault(point.name, [])
        if not any(claim.value == point.value and _owner(claim) == _owner(point) for claim in claims):
            claims.append(point)
    return [load_plugin(points) for _, points in sorted(found.items())]


def _owner(point: EntryPoint) -> tuple[str | None, str | None]:
    distribution = getattr(point, "dist", None)
    return (distribution.name, distribution.version) if distribution is not None else (None, None)


def load_plugin(points: list[EntryPoint]) -> PluginInfo:
    """Load the plugin that these entry points of one name claim; any fault becomes its `error`."""
    point = points[0]
    distribution, version = _owner(point)
    try:
        if len(points) > 1:
            owners = sorted(f"{claim.value} of {' '.join(map(str, _owner(claim)))}" for claim in points)
            raise ConfigError(f"its name is claimed by {' and '.join(owners)}", do="uninstall all but one")
        return inspect_plugin(point.name, point.load(), distribution, version)
    except (Exception, SystemExit) as error:  # whatever a stranger's module raises is that plugin's fault alone
        return PluginInfo(point.name, distribution, version, error=_reason(error))


def inspect_plugin(name: str, plugin: Any, distribution: str | None = None, version: str | None = None) -> PluginInfo:
    """Check the hooks of a plugin object and return its record.

    Raises:
        ConfigError: bad name, unknown hook, bad signature, or `options()` and `activate()` do not fit.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or hasattr(OptionsTree, name) or name in OptionsTree.model_fields:
        raise ConfigError(
            f"a plugin cannot be named {name!r}",
            allowed="allowed are lower-case letters, digits and underscores, and no name of the options tree itself",
        )
    hook = _checked(PluginHooks, plugin, name)
    options = hook.options() if hook.options.get_hookimpls() else None
    if options is not None and not (isinstance(options, type) and issubclass(options, PluginOptions)):
        raise ConfigError(
            f"options() returned {options!r}", allowed="allowed is a subclass of jettison.hooks.config.PluginOptions"
        )
    if (options is None) == bool(hook.activate.get_hookimpls()):
        raise ConfigError("it has only one of options() and activate()", do="implement both or neither")
    return PluginInfo(name, distribution, version, object=plugin, hook=hook, options=options)


def _checked(specs: type, plugin: Any, name: str) -> Any:
    """Return the hook relay of `plugin` alone, after checking every hook's name and signature."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(specs)
    try:
        manager.register(plugin, name)
    except pluggy.PluginValidationError as error:
        raise ConfigError(
            f"plugin {name!r} has a hook with a bad signature ({' '.join(str(error).split())})",
            do="use the arguments of jettison.hooks.specs",
        ) from error
    known = [hook for hook in vars(specs) if not hook.startswith("_")]
    for caller in manager.get_hookcallers(plugin) or []:
        if caller.name not in known:
            raise _unknown_hook(caller.name, name, known)
    return manager.hook


def _unknown_hook(hook: str, name: str, known: list[str]) -> ConfigError:
    if hook in vars(EngineHooks):
        do = f"put {hook!r} on the object that activate() returns"
    elif hook in vars(PluginHooks):
        do = f"put {hook!r} on the plugin itself"
    else:
        guess = nearest(hook, known)
        do = f"did you mean {guess!r}?" if guess else "remove it"
    return ConfigError(
        f"plugin {name!r} implements the unknown hook {hook!r}", allowed=f"known here are {', '.join(known)}", do=do
    )


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return text if isinstance(error, JettisonError) else f"{type(error).__name__}: {text}"


def _broken(info: PluginInfo) -> EnvironmentRefused:
    owner = f" of {info.distribution} {info.version}" if info.distribution else ""
    return EnvironmentRefused(
        f"plugin {info.name!r}{owner} cannot be used ({info.error})",
        do=f"repair or uninstall {info.distribution or 'it'}",
    )
