"""A vLLM engine in a process of its own, told what to measure: `python -m jettison.hooks.vllm.measure`.

Commands come as JSON lines on stdin, answers go as JSON lines to what was stdout; everything else goes to stderr. So
several engines can stand side by side and be measured in turn. `jettison.hooks.engine_process` is the other end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

Answer = dict[str, Any]


class Engine:
    """One engine; each public method is a command."""

    def __init__(self, arguments: Sequence[str]) -> None:
        started = time.perf_counter()
        from vllm import LLM
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        imported = time.perf_counter()
        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        self._llm = LLM.from_engine_args(EngineArgs.from_cli_args(parser.parse_args(list(arguments))))
        self._seconds = {"import_s": imported - started, "engine_s": time.perf_counter() - imported}

    def describe(self) -> Answer:
        """Seconds of the start, KV capacity in tokens, and what is in force."""
        config = self._llm.llm_engine.vllm_config
        blocks, size = config.cache_config.num_gpu_blocks, config.cache_config.block_size
        active = bool(config.additional_config.get("jettison"))
        status = self._llm.collective_rpc("jettison_status") if active else None
        return {**self._seconds, "blocks": blocks, "block_size": size, "tokens": blocks * size, "status": status}

    def logits(self, texts: list[list[int]], file: str, compare: bool) -> Answer:
        """Next-token distributions of every position of `texts`, seen inside the model.

        Stores them in `file`, or compares them with the ones stored there. Prompt log-probabilities are asked for so
        that the runner computes the logits of all prompt positions; they are taken from the model's logits processor.
        """
        from safetensors import safe_open
        from safetensors.torch import save_file

        from jettison.hooks.quality import compare as compare_logits
        from jettison.hooks.quality import summarise

        if not compare:
            save_file({str(n): self._prompt_logits(ids) for n, ids in enumerate(texts)}, file)
            return {}
        with safe_open(file, "pt") as stock:
            parts = [compare_logits(stock.get_tensor(str(n)), self._prompt_logits(ids)) for n, ids in enumerate(texts)]
        return asdict(summarise(parts))

    def generate(self, prompts: list[list[int]], tokens: int) -> Answer:
        """Greedy answers, at most `tokens` tokens each."""
        outputs = self._run(prompts, temperature=0.0, max_tokens=tokens)
        return {"texts": [output.outputs[0].text for output in outputs]}

    def prefill(self, prompts: list[list[int]]) -> Answer:
        """Tokens/s of computing all `prompts` at once, none of them cached."""
        self._llm.reset_prefix_cache()
        return {"prefill_tokens_per_s": sum(map(len, prompts)) / self._timed(prompts, 1)}

    def decode(self, prompts: list[list[int]], tokens: int) -> Answer:
        """Decode tokens/s over `prompts`, which should be cached by now.

        The figure is the difference between a long and a one-token generation, both with prompts cached, so neither
        the prefill nor the start of a batch is in it.
        """
        short, long = self._timed(prompts, 1), self._timed(prompts, 1 + tokens)
        seconds = max(long - short, 1e-9)
        return {"decode_tokens_per_s": len(prompts) * tokens / seconds, "decode_step_s": seconds / tokens}

    def _timed(self, prompts: list[list[int]], tokens: int) -> float:
        started = time.perf_counter()
        self._run(prompts, temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        return time.perf_counter() - started

    def _run(self, prompts: list[list[int]], **sampling: Any) -> list[Any]:
        from vllm import SamplingParams

        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        return list(self._llm.generate(inputs, SamplingParams(**sampling), use_tqdm=False))

    def _prompt_logits(self, ids: list[int]) -> Any:
        import torch

        seen: list[Any] = []

        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            if output is not None and output.shape[0] > 1:
                seen.append(output.detach().to("cpu", torch.bfloat16, copy=True))

        handle = self._llm.apply_model(lambda model: model.logits_processor.register_forward_hook(keep))[0]
        try:
            self._run([ids], temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        finally:
            handle.remove()
        # NOTES: the V2 model runner computes the last position's logits too, the V1 runner in a call of its own.
        logits = torch.cat(seen)
        if logits.shape[0] not in (len(ids) - 1, len(ids)):
            raise RuntimeError(f"the engine computed {logits.shape[0]} prompt logits for {len(ids)} tokens")
        return logits[: len(ids) - 1]


def main() -> None:
    """Answer commands until stdin ends. The first one starts the engine: `{"start": [vLLM arguments]}`."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    engine: Engine | None = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if engine is None:
                engine = Engine(command["start"])
                answer = engine.describe()
            else:
                method: Callable[..., Answer] = getattr(engine, command.pop("do"))
                answer = method(**command)
        except Exception as error:  # the other end raises it with the log at hand
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
