"""The continuous-batching cache of transformers against the shared-prefix cache, on the policy's part alone.

    python benchmarks/continuous_batching.py --model 30m --prompt 500 --output continuous_batching.json

K continuations of a prompt, the first is accepted, K continuations of that, and so on. transformers forks a
request (`num_return_sequences`) behind its prompt only and gives a finished request's state back as a cached
prefix, so every step is a new request over prompt and accepted steps, its prefix sharing on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring import machine, mib, table, write_results
from shapes import ABOUT_1M, ABOUT_30M, SMOLLM2_135M, TINY, Shape
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from mahalo_ray.decoding.engine import Engine
from mahalo_ray.decoding.sampling import SamplingParams

SHAPES: dict[str, Shape] = {"tiny": TINY, "1m": ABOUT_1M, "30m": ABOUT_30M, "135m": SMOLLM2_135M}
PAGE = 32


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="30m")
    parser.add_argument("--prompt", type=int, default=500, help="tokens")
    parser.add_argument("--candidates", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--step-tokens", type=int, default=40)
    parser.add_argument("--output", type=Path, default=None, help="results as JSON")
    options = parser.parse_args(arguments)
    shape = SHAPES[options.model]
    policy = shape.build(1, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(shape.end_id, (options.prompt,), generator=generator).tolist()
    results: dict[str, Any] = {"benchmark": "continuous_batching", "machine": machine(), **vars(options)}
    results["output"] = None
    # Ours first: transformers switches the model's attention for good.
    for name, way in (("ours", ours), ("transformers", theirs)):
        way(policy, prompt, options.candidates, 1, 2)  # what happens once
        results[name] = way(policy, prompt, options.candidates, options.steps, options.step_tokens)
    print(report(results))
    if options.output is not None:
        write_results(options.output, results)


def ours(
    policy: PreTrainedModel, prompt: list[int], candidates: int, steps: int, tokens: int
) -> dict[str, Any]:
    """Branches over a shared prefix."""
    seconds, engine, total = [], Engine(policy), 0
    for number in range(steps):
        started = time.perf_counter()
        if number == 0:
            rows = engine.add(1)
            engine.append(rows, [prompt])
        offered = engine.sample(rows, candidates, SamplingParams(), [0], tokens, [])
        engine.accept(offered, [0])
        seconds.append(time.perf_counter() - started)
        total += offered.num_tokens
    read = engine.tokens_forwarded
    return {"seconds": seconds, "sampled": total, "forwarded": read, "cache_bytes": engine.peak_bytes}


def theirs(
    policy: PreTrainedModel, prompt: list[int], candidates: int, steps: int, tokens: int
) -> dict[str, Any]:
    """Blocks forked behind the prompt; what was accepted comes back as a cached prefix."""
    pages = -(-(len(prompt) + (steps + candidates) * tokens) // PAGE) * 2 + 4 * candidates
    manager = policy.init_continuous_batching(
        GenerationConfig(
            do_sample=True, num_return_sequences=candidates, max_new_tokens=tokens, eos_token_id=-1, top_k=0
        ),
        ContinuousBatchingConfig(page_size=PAGE, num_blocks=pages, max_batch_tokens=2048),
    )
    manager.start()
    text, seconds, total = list(prompt), [], 0
    try:
        for _ in range(steps):
            started = time.perf_counter()
            asked = manager.add_request(text, max_new_tokens=tokens)
            found = {}
            while len(found) < candidates:
                one = manager.get_result(timeout=300)
                if one is None:
                    raise RuntimeError("transformers gave no result within five minutes")
                if one.is_finished():
                    found[one.request_id] = one.generated_tokens
            text += found[asked]
            seconds.append(time.perf_counter() - started)
            total += sum(map(len, found.values()))
        cache = manager.batch_processor.cache
        allocated = sum(a._copy_view.nbytes for a in cache.cache_allocators.values())
    finally:
        manager.stop(block=True)
        manager.destroy()
    return {"seconds": seconds, "sampled": total, "cache_bytes": allocated}


def report(results: dict[str, Any]) -> str:
    """Seconds of the first step, which reads the prompt, and of the others."""
    rows = []
    for name in ("ours", "transformers"):
        one = results[name]
        later = median(one["seconds"][1:])
        rate = results["candidates"] * results["step_tokens"] / later
        rows.append(
            [name, f"{one['seconds'][0]:.2f}", f"{later:.2f}", f"{rate:.0f}", mib(one["cache_bytes"])]
        )
    return table(["way", "first step s", "later steps s (median)", "tokens sampled/s", "cache"], rows)


if __name__ == "__main__":
    main()
