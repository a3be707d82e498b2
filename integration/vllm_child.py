"""Run one engine in processes of its own and print what it did as JSON: `python vllm_child.py '{"model": ...}'`."""

from __future__ import annotations

import json
import sys
from typing import Any


def main(order: dict[str, Any]) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(**order["engine"])
    params = SamplingParams(temperature=0.0, max_tokens=order["tokens"], logprobs=20, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in order["prompts"]], params, use_tqdm=False)
    answers = [
        {
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [{t: e.logprob for t, e in step.items()} for step in output.outputs[0].logprobs],
        }
        for output in outputs
    ]
    found = {"answers": answers, "status": llm.collective_rpc("jettison_status")}
    if order["engine"].get("speculative_config"):
        values = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
        found["drafts"] = {name: values[f"vllm:spec_decode_num_{name}_tokens"] for name in ("draft", "accepted")}
    print("ANSWER " + json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
