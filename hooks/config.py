"""The tree of options: one pydantic section per plugin, carried as content in the engine's `--additional-config`."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, SecretBytes, SecretStr, ValidationError

from jettison.hooks.errors import ConfigError
from jettison.hooks.files import check_plain

SECTION = "jettison"

SecretEnv = Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$", max_length=128, json_schema_extra={"secret_env": True})]
"""Type of an option that names the environment variable which holds a secret. The secret itself is never an option."""

_SECRET_NAME = re.compile(r"(^|_)(api_key|access_token|auth_token|passwd|password|secret|credentials?)$")


class PluginOptions(BaseModel):
    """Base of every plugin's section: unknown keys are refused, instances are frozen, no field may hold a secret.

    A subclass may define `from_flag(cls, value: str) -> dict[str, Any]`, which turns the VALUE of `--with NAME=VALUE`
    into the section's content (files are inlined).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        for name, field in cls.model_fields.items():
            if _SECRET_NAME.search(name) or _holds_secret(field.annotation):
                raise ConfigError(
                    f"option {cls.__name__}.{name} would hold a secret, and engines print their options",
                    allowed="allowed is the name of an environment variable",
                    do=f"declare `{name}_env: jettison.hooks.config.SecretEnv`",
                )


def _holds_secret(annotation: Any) -> bool:
    return annotation in (SecretStr, SecretBytes) or any(_holds_secret(part) for part in get_args(annotation))


OptionsT = TypeVar("OptionsT", bound=PluginOptions)


class OptionsTree(BaseModel):
    """The whole `jettison` section: `strict`, and one field per installed plugin, None where it is not active."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strict: bool = False
    """Refuse to start if any installed plugin is broken, also one that is not asked for."""

    def sections(self) -> dict[str, PluginOptions]:
        """Return the options of the active plugins by name, in alphabetical order."""
        values = {name: getattr(self, name) for name in sorted(type(self).model_fields)}
        return {name: value for name, value in values.items() if isinstance(value, PluginOptions)}


def section_from(additional_config: object) -> Mapping[str, Any] | None:
    """Return the `jettison` section of an engine's `additional_config`, or None if there is none.

    Raises:
        ConfigError: the section is not a mapping, or a key looks like a misspelling of `jettison`.
    """
    if not isinstance(additional_config, Mapping):
        return None
    if SECTION not in additional_config:
        for key in additional_config:
            if isinstance(key, str) and nearest(key.lower(), [SECTION]) is not None:
                raise ConfigError(f"--additional-config has the key {key!r}", do=f"write {SECTION!r}")
        return None
    section = additional_config[SECTION]
    if not isinstance(section, Mapping):
        raise ConfigError(
            f"--additional-config {SECTION!r} is of type {type(section).__name__}",
            allowed="allowed is an object with one section per plugin",
            do='write for example {"jettison": {"kvtuner": {"pair": "k8v4"}}}',
        )
    return section


def parse_section(options: type[OptionsT], name: str, content: object) -> OptionsT:
    """Validate the JSON-like content of plugin `name`'s section, strictly typed.

    Raises:
        ConfigError: what is wrong first, and where. Values of unknown keys and of secrets are never shown.
    """
    if not isinstance(content, Mapping):
        raise ConfigError(
            f"section {name!r} is of type {type(content).__name__}",
            allowed="allowed is an object of options",
            do=f"write {{}} for the defaults of {name!r} or remove the section",
        )
    plain = dict(content)
    try:
        check_plain(plain, name)
        text = json.dumps(plain, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{error}", do="use plain JSON values") from error
    try:
        return options.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise _sentence(options, name, error) from error


def _sentence(options: type[BaseModel], name: str, error: ValidationError) -> ConfigError:
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    steps = first["loc"]
    place = ".".join(map(str, (name, *steps)))
    more = f" ({len(problems) - 1} more problems)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _keys_at(options, steps[:-1])
        return unknown_key(str(steps[-1]), known, what=f"option {place!r} is unknown{more}")
    found = "" if first["type"] == "missing" else _shown(first["input"], place)
    return ConfigError(f"option {place!r}{found} is refused{more}", allowed=_clause(first["msg"]), do="correct it")


def _clause(message: str) -> str:
    text = message.removeprefix("Value error, ")
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def _shown(value: object, place: str) -> str:
    if re.search(r"_env$|key$|token$|secret|password|url", place.rsplit(".", 1)[-1]) or isinstance(value, Mapping):
        return ""
    text = repr(value)
    return f" = {text if len(text) <= 60 else text[:57] + '...'}"


def _keys_at(options: type[BaseModel], steps: Iterable[int | str]) -> list[str]:
    model: type[BaseModel] | None = options
    for step in steps:
        field = model.model_fields.get(str(step)) if model is not None and isinstance(step, str) else None
        if field is not None:
            model = next(iter(_models_in(field.annotation)), None)
    return sorted(model.model_fields) if model is not None else []


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that `word` most likely means, or None."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)), None)


def unknown_key(key: str, known: Iterable[str], *, what: str) -> ConfigError:
    """Return the refusal of an unknown key, with the nearest known one."""
    names = sorted(known)
    guess = nearest(key, names)
    return ConfigError(
        what,
        allowed=f"known are {', '.join(names)}" if names else "none is known here",
        do=f"did you mean {guess!r}?" if guess else "remove it",
    )


def options_sha256(options: BaseModel) -> str:
    """Return the SHA-256 of the canonical JSON of `options`: equal on every rank that has the same options."""
    text = json.dumps(options.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_secret(variable: str) -> SecretStr:
    """Return the secret that the named environment variable holds; its text shows only as asterisks.

    Raises:
        ConfigError: the variable is unset or empty.
    """
    value = os.environ.get(variable, "")
    if not value:
        raise ConfigError(f"environment variable {variable} is not set", do="export it before starting the engine")
    return SecretStr(value)
