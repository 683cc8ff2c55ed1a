"""Memory of an endpoint's replica over many requests: does it keep what it should not?

Runs the endpoint's app over a tiny policy and reward model in this process, without Ray and sockets, and
sends requests of every kind: guided and not, streamed and whole, refused ones, scores, texts and stop
strings that never come again. Resident memory is read every so often; the slope is that of a least-squares
line over the second half. Two more figures tell a leak from an allocator that keeps freed pages: what the C
library has handed out and not got back (mallinfo2; glibc only), and how many blocks Python's objects occupy.
--trace counts the bytes of these too (tracemalloc), several times slower.

    python benchmarks/endpoint_memory.py --requests 8000
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import json
import sys
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import httpx
import numpy as np
import psutil
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from mahalo_ray.config import SamplingConfig, ServeConfig
from mahalo_ray.decoding import GuidedDecoder
from mahalo_ray.domains.sft_text import train_tokenizer
from mahalo_ray.models import MultiHeadCausalLM, ProcessRewardModel
from mahalo_ray.serving.app import create_app
from mahalo_ray.serving.backend import GuidedBackend
from mahalo_ray.serving.service import ChatService, Defaults, ServiceSettings

MIB = 2**20
OBJECTIVES = ("accuracy", "engagement")
TEXTS = ["So we add 2 and 3.\n\nThat gives 5.", "Well done! What comes next?", "Is it 7? Try again."]


def make_service() -> ChatService:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS * 3, 300)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
    )
    policy = MultiHeadCausalLM.from_base(AutoModelForCausalLM.from_config(config), OBJECTIVES, noise=0.3)
    reward = ProcessRewardModel.from_base(
        AutoModelForCausalLM.from_config(config),
        {"accuracy": "value", "engagement": "probability"},
        tuning="frozen",
        tokenizer=tokenizer,
        step_separator="\n\n",
    )
    decoder = GuidedDecoder(policy.eval(), reward.eval(), "math", tokenizer, 64)
    settings = ServiceSettings(
        ServeConfig(max_ongoing_requests=8, max_queued_requests=64, max_new_tokens=64, batch_window_s=0.0),
        "mahalo",
        Defaults(num_candidates=3, sampling=SamplingConfig(max_new_tokens=16)),
    )
    return ChatService(GuidedBackend(decoder), settings)


def requests(count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, body), no two alike."""
    rng = np.random.default_rng(0)
    for number in range(count):
        text = f"{number}: " + " ".join(
            rng.choice(["add", "take", "2", "3", "coins", "why?"], rng.integers(2, 30))
        )
        messages = [{"role": "user", "content": text}]
        body: dict[str, Any] = {"model": "mahalo", "messages": messages, "seed": number}
        kind = number % 6
        if kind == 0:
            body |= {"strategy": "none", "stream": True, "max_tokens": 12}
        elif kind == 1:
            body |= {"stream": True, "stop": [f"never {number}"]}
        elif kind == 2:
            body |= {"num_candidates": 1 + number % 4, "objectives": {"accuracy": 1 + number % 7}}
        elif kind == 3:
            body |= {f"unknown_{number}": number}
        elif kind == 4:
            yield "/v1/score", {"messages": messages, "candidates": [f"{number}?", "Add 2.", text]}
            continue
        yield "/v1/chat/completions", body


_HEAP_COUNTS = (
    *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
    *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
)


class HeapCounts(ctypes.Structure):
    """glibc's struct mallinfo2. `uordblks`: bytes in use on the heaps; `hblkhd`: in blocks of their own."""

    _fields_: ClassVar = [(name, ctypes.c_size_t) for name in _HEAP_COUNTS]


def bytes_in_use() -> float:
    """What malloc has handed out, in MiB; Python's small objects are not among it. nan without glibc."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        return float("nan")
    library.mallinfo2.restype = HeapCounts
    counts = library.mallinfo2()
    return (counts.uordblks + counts.hblkhd) / MIB


class Sample(NamedTuple):
    """Memory after so many answers, in MiB; `blocks`: thousands of Python's."""

    answered: int
    resident: float
    in_use: float
    blocks: float
    traced: float

    def __str__(self) -> str:
        return (
            f"{self.answered:>8} requests {self.resident:>8.1f} MiB resident {self.in_use:>8.1f} in use "
            f"{self.blocks:>8.1f} thousand blocks {self.traced:>8.2f} MiB traced"
        )


async def soak(count: int, every: int, seconds: float, trace: bool) -> list[Sample]:
    """A sample every so many requests, 8 at a time, until so many are answered or so long has passed."""
    began = time.monotonic()
    app = create_app(make_service())
    process, samples = psutil.Process(), list[Sample]()
    transport = httpx.ASGITransport(app)
    waiting = requests(count)
    answered = 0
    async with httpx.AsyncClient(transport=transport, base_url="http://soak", timeout=120) as client:
        while time.monotonic() < began + seconds and (
            batch := [item for _, item in zip(range(8), waiting, strict=False)]
        ):
            answers = await asyncio.gather(*(client.post(path, json=body) for path, body in batch))
            assert all(answer.status_code in (200, 400) for answer in answers)
            answered += len(batch)
            if answered % every < len(batch):
                gc.collect()
                held = tracemalloc.get_traced_memory()[0] / MIB if trace else float("nan")
                resident, blocks = process.memory_info().rss / MIB, sys.getallocatedblocks() / 1000
                samples.append(Sample(answered, resident, bytes_in_use(), blocks, held))
                print(samples[-1], flush=True)
    app.state.services.first.worker.close()
    return samples


def slope(samples: list[Sample], column: str) -> float:
    """By how much it grows in 1,000 requests, over the second half of the samples."""
    late = samples[len(samples) // 2 :]
    values = [getattr(sample, column) for sample in late]
    return 1000 * float(np.polyfit([sample.answered for sample in late], values, 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=8000)
    parser.add_argument("--every", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=600.0, help="stop after so long")
    parser.add_argument(
        "--trace", action="store_true", help="count Python's own memory too; several times slower"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.trace:
        tracemalloc.start()
    samples = asyncio.run(soak(options.requests, options.every, options.seconds, options.trace))
    columns = ["resident", "in_use", "blocks", *(["traced"] if options.trace else [])]
    growth = {name: round(slope(samples, name), 3) for name in columns}
    print(json.dumps({"requests": samples[-1].answered, "per_1000_requests": growth}))


if __name__ == "__main__":
    main()
