"""From a model folder and real text to a table: load, measure, choose, wrap."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jettison.csrc.layout import PageLayout
from jettison.hooks import __version__ as version
from jettison.hooks import assets
from jettison.hooks.errors import ConfigError, InputRefused
from jettison.plugins.kvtuner.select import choose
from jettison.plugins.kvtuner.sensitivity import PAIRS, Progress, Sensitivity, measure
from jettison.plugins.kvtuner.table import (
    LayerBits,
    ModelShape,
    Pair,
    Payload,
    Source,
    Table,
    encode_channels,
    seal,
)

METHOD = "fisher-kl, dynamic programme"
MIN_TOKENS = 64


@dataclass(frozen=True)
class Settings:
    """What a table is made for.

    Attributes:
        ratio: tokens that fit, as a multiple of a 16-bit cache; scales, zeros and sink area included.
        sink_tokens: first tokens of a sequence kept at 16 bits.
        block_size: tokens per block of the engine; every block pays for a sink area. vLLM: 128 on CPU.
        texts, length: number of calibration texts and tokens of each, half mathematics and half articles.
        seed: of the sampled tokens.
    """

    ratio: float = 3.0
    sink_tokens: int = 1
    block_size: int = 128
    texts: int = 2
    length: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1.0 <= self.ratio <= 8.0:
            raise ConfigError(f"ratio {self.ratio:g} is refused", allowed="allowed are 1 to 8", do="3 is a good start")
        if not 0 <= self.sink_tokens <= 16:
            raise ConfigError(f"sink tokens {self.sink_tokens} are refused", allowed="allowed are 0 to 16")
        if self.block_size < 16 or self.block_size % 16:
            raise ConfigError(f"block size {self.block_size} is refused", allowed="allowed are multiples of 16")


def load_model(folder: str) -> tuple[Any, Any]:
    """Load a Hugging Face causal LM in float32 and its tokenizer, on the accelerator if there is one.

    Raises:
        InputRefused: the folder or hub name does not open as a causal LM.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputRefused(f"{folder} does not open as a causal LM ({reason})", do="give a checkpoint") from error
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def token_texts(tokenizer: Any, split: assets.Split, count: int, length: int) -> list[Tensor]:
    """`count` texts of `length` token ids: GSM8K, then as many long articles of the packaged data, or one fewer.

    An article that is too short goes on with articles of its own that no other text has.

    Raises:
        InputRefused: the packaged data are not that long.
    """
    problems, articles = assets.texts(split)
    halves = [(count + 1) // 2, count // 2]
    mathematics = tokenizer(problems[: halves[0] * length * 8]).input_ids
    chunks = [mathematics[n * length : (n + 1) * length] for n in range(halves[0])]
    spare = iter(articles[halves[1] :])
    for article in articles[: halves[1]]:
        ids = tokenizer(article).input_ids[:length]
        while len(ids) < length and (more := next(spare, None)) is not None:
            ids += tokenizer(more).input_ids[: length - len(ids)]
        chunks.append(ids)
    if short := [len(ids) for ids in chunks if len(ids) < length]:
        raise InputRefused(
            f"the packaged texts are too short: {count} of {length} tokens are wanted, one has {short[0]}",
            do="ask for fewer or shorter ones, or give text files with --text",
        )
    return [torch.tensor(ids) for ids in chunks]


def file_texts(tokenizer: Any, files: Sequence[Path], length: int) -> list[Tensor]:
    """The first `length` token ids of each text file.

    Raises:
        InputRefused: a file cannot be read or has fewer than 64 tokens.
    """
    texts = []
    for file in files:
        try:
            ids = tokenizer(file.read_text(encoding="utf-8")).input_ids[:length]
        except (OSError, UnicodeDecodeError) as error:
            raise InputRefused(f"cannot read the text {file} ({error})", do="give UTF-8 text files") from error
        if len(ids) < MIN_TOKENS:
            raise InputRefused(f"{file} has {len(ids)} tokens", allowed=f"at least {MIN_TOKENS} are needed")
        texts.append(torch.tensor(ids))
    return texts


def costs(shape: ModelShape, settings: Settings) -> list[int]:
    """Bytes per token and layer, all KV heads, for each of `PAIRS`."""
    layouts = [PageLayout(shape.head_size, key, value, settings.sink_tokens) for key, value in PAIRS]
    return [shape.num_kv_heads * layout.bytes_per_token(settings.block_size) for layout in layouts]


def choose_pairs(sensitivity: Sensitivity, shape: ModelShape, settings: Settings) -> tuple[list[Pair], float]:
    """The best pair of every layer within the budget, and the sum of their predicted KL in nats."""
    budget = int(shape.num_layers * shape.num_kv_heads * shape.head_size * 4 / settings.ratio)
    errors = sensitivity.kl.tolist()
    picked = choose(errors, [costs(shape, settings)] * shape.num_layers, budget)
    return [PAIRS[index] for index in picked], sum(row[index] for row, index in zip(errors, picked, strict=True))


def model_shape(folder: str, sensitivity: Sensitivity) -> ModelShape:
    """Name, configuration hash and measured shape of the model."""
    from transformers.utils import cached_file

    layers, heads, size = sensitivity.key_center.shape
    config = Path(str(cached_file(folder, "config.json"))).read_bytes()
    architectures = json.loads(config).get("architectures") or [None]
    name = Path(folder).resolve().name if Path(folder).is_dir() else folder
    return ModelShape(
        name=name,
        architecture=architectures[0],
        config_sha256=hashlib.sha256(config).hexdigest(),
        num_layers=layers,
        num_kv_heads=heads,
        head_size=size,
    )


def make_table(sensitivity: Sensitivity, shape: ModelShape, source: Source, settings: Settings) -> Table:
    """Choose the pairs and wrap them with the static codec into a validated table."""
    pairs, predicted = choose_pairs(sensitivity, shape, settings)
    payload = Payload(
        layers=[LayerBits(layer=n, key_bits=k, value_bits=v) for n, (k, v) in enumerate(pairs)],  # type: ignore[arg-type]
        rotate=True,
        sink_tokens=settings.sink_tokens,
        key_center=encode_channels(sensitivity.key_center),
        key_scale=encode_channels(sensitivity.key_scale),
    )
    return seal(
        {
            "schema": 1,
            "kind": "kvtuner.table",
            "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "jettison": version,
            "model": shape,
            "source": source.model_copy(update={"predicted_kl": predicted}),
            "payload": payload,
        }
    )


def calibrate(
    folder: str, settings: Settings, files: Sequence[Path] = (), *, progress: Progress = lambda _w, _d, _t: None
) -> tuple[Table, Sensitivity]:
    """Measure the model in `folder` on the packaged text, or on `files`, and make its table.

    Raises:
        JettisonError: model, text or budget is refused.
    """
    progress("load model", 0, 1)
    model, tokenizer = load_model(folder)
    if files:
        texts = file_texts(tokenizer, files, settings.length)
    else:
        texts = token_texts(tokenizer, "calibration", settings.texts, settings.length)
    sensitivity = measure(model, texts, sink_tokens=settings.sink_tokens, seed=settings.seed, progress=progress)
    source = Source(
        method=METHOD,
        data="files" if files else f"{assets.TEXT_PACKAGE}: gsm8k, squad, drop, coqa",
        data_sha256=hashlib.sha256(b"".join(ids.numpy().astype("<i8").tobytes() for ids in texts)).hexdigest(),
        tokens=sensitivity.tokens,
        seed=settings.seed,
        capacity_ratio=settings.ratio,
        block_size=settings.block_size,
    )
    return make_table(sensitivity, model_shape(folder, sensitivity), source, settings), sensitivity
