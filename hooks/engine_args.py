"""vLLM's command line as far as Jettison has to understand it: five flags are read, everything else is passed on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jettison.hooks.errors import ConfigError, InputRefused
from jettison.hooks.files import parse_document, read_document

_OURS = ("--additional-config", "--attention-backend", "--config", "--logits-processors", "--worker-extension-cls")
_SECRETS = {"--api-key": "VLLM_API_KEY", "--hf-token": "HF_TOKEN"}


@dataclass
class EngineArgs:
    """The arguments of `vllm serve`.

    Attributes:
        rest: arguments passed on as they are, the model among them.
        config_path, config: the file of `--config` and its content without `additional-config`.
        additional_config: the merged `--additional-config`, dotted and from the file; the command line wins.
        logits_processors: as given.
        given: the single values of the other flags that we also set.
    """

    rest: list[str] = field(default_factory=list)
    config_path: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    additional_config: dict[str, Any] = field(default_factory=dict)
    logits_processors: list[str] = field(default_factory=list)
    given: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> EngineArgs:
        """Read the arguments after `vllm serve`.

        Raises:
            ConfigError: a flag without value, bad JSON, a secret on the command line, or two `--config`.
            InputRefused: the file of `--config` cannot be used.
        """
        args = cls()
        queue = list(arguments)
        dotted: dict[str, Any] = {}
        while queue:
            token = queue.pop(0)
            name, equals, value = token.partition("=")
            option = _canonical(name)
            if option in _SECRETS and (equals or (queue and not queue[0].startswith("--"))):
                do = f"export {_SECRETS[option]} and leave {option} out"
                raise ConfigError(f"{option} puts a secret on the command line", do=do)
            if option is None:
                args.rest.append(token)
            elif option.startswith("--additional-config."):
                text = value if equals else _next(option, queue)
                dotted = merge(dotted, _nested(option, text), "--additional-config")
            elif option == "--logits-processors":
                args.logits_processors += [value] if equals else _many(queue)
            elif option in _OURS:
                args._take(option, value if equals else _next(option, queue))
            else:
                args.rest.append(token)
        args._read_config()
        args.additional_config = _override(args.additional_config, dotted)
        return args

    def _take(self, option: str, value: str) -> None:
        if option == "--config":
            if self.config_path is not None:
                raise ConfigError("--config is given twice", do="merge the two files")
            self.config_path = value
        elif option == "--additional-config":
            content = _json_flag(value)
            self.additional_config = _override(self.additional_config, content)
        else:
            self.given[option] = value

    def _read_config(self) -> None:
        if self.config_path is None:
            return
        content = read_document(self.config_path)
        if not isinstance(content, dict):
            raise InputRefused(f"{self.config_path} is not a mapping of flags", do="see vLLM's --config")
        for key in list(content):
            option = _canonical(f"--{key}")
            if option == "--additional-config":
                carried = content.pop(key)
                below = _json_flag(carried) if isinstance(carried, str) else carried
                self.additional_config = _override(below, self.additional_config)
            elif option in _OURS and option is not None:
                self._inherit(option, content, key)
        self.config = content

    def _inherit(self, option: str, content: dict[str, Any], key: str) -> None:
        if option == "--logits-processors":
            value = content[key]
            inherited = [str(name) for name in value] if isinstance(value, list) else [str(value)]
            self.logits_processors = self.logits_processors or inherited
        else:
            self.given.setdefault(option, str(content[key]))

    @property
    def config_flag(self) -> list[str]:
        """The user's own `--config`, as vLLM wants it."""
        return ["--config", self.config_path] if self.config_path is not None else []

    def require(self, option: str, value: str, why: str) -> None:
        """Refuse if the user gave `option` another value than ours."""
        found = self.given.get(option, value)
        if found != value:
            raise ConfigError(f"{option} is {found}", allowed=f"allowed is {value}, which {why}", do=f"remove {option}")


def _canonical(name: str) -> str | None:
    """Return the full name of a flag that concerns us, or None; underscores and abbreviations are argparse's."""
    if not name.startswith("--"):
        return None
    head, dot, tail = name.partition(".")
    head = head.replace("_", "-")
    for option in (*_OURS, *_SECRETS):
        if head == option or (len(head) > 9 and option.startswith(head)):
            return f"{option}.{tail}" if dot else option
    return None


def _next(option: str, queue: list[str]) -> str:
    if not queue:
        raise ConfigError(f"{option} has no value", do="give one")
    return queue.pop(0)


def _many(queue: list[str]) -> list[str]:
    values: list[str] = []
    while queue and not queue[0].startswith("-"):
        values.append(queue.pop(0))
    return values


def _json_flag(text: str) -> dict[str, Any]:
    try:
        content = parse_document(text, "--additional-config")
    except InputRefused as error:
        raise ConfigError(error.found, allowed=error.allowed, do=error.do) from error
    if not isinstance(content, dict):
        raise ConfigError(f"--additional-config is a {type(content).__name__}", allowed="allowed is a JSON object")
    return content


def _nested(option: str, text: str) -> dict[str, Any]:
    if option.endswith("+"):
        raise ConfigError(f"{option} appends to a list", do="give the whole list as JSON")
    try:
        value: Any = json.loads(text)
    except ValueError:
        value = text
    for key in reversed(option.split(".")[1:]):
        value = {key: value}
    return dict(value)


def _override(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = _override(old, value) if both and old is not None else value
    return result


def merge(first: Mapping[str, Any], second: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return the union of two trees.

    Raises:
        ConfigError: both give a value at the same place.
    """
    result = dict(first)
    for key, value in second.items():
        old = result.get(key)
        if key not in result:
            result[key] = value
        elif isinstance(old, Mapping) and isinstance(value, Mapping):
            result[key] = merge(old, value, f"{place}.{key}")
        else:
            raise ConfigError(f"{place}.{key} is given twice", do="give it in one place")
    return result
