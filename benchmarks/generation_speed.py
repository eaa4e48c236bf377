"""Measure the tokens per second of generation, with vLLM if it is installed, else with transformers.

    python benchmarks/generation_speed.py --student DIR [--rows 256] [--tokens 128]

Rows are decoded together (with transformers at most 64 on a CPU, 512 on a GPU), each until the model ends it. *By
bandwidth* is how many the reads of the weights would allow: every token reads them once for all rows, at the speed of a large
copy.
"""

import argparse
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from machine import copy_peak

from montessori_core.config import DataSource, Sampling
from montessori_core.data.sources import read_tasks
from montessori_core.models import flops
from montessori_core.models.load import load_tokenizer
from montessori_core.models.rendering import render_prompt
from montessori_core.processor import generation_dtype
from montessori_core.synthesis.engine import Generated, Request
from montessori_core.synthesis.generation import open_engine


def main() -> None:
    """Measure and print a line."""
    device = torch.device("cuda" if torch.cuda.device_count() else "cpu")  # without CUDA in this process: vLLM forks
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, required=True, help="model folder")
    parser.add_argument("--rows", type=int, default=256 if device.type == "cuda" else 16, help="texts to write")
    parser.add_argument("--tokens", type=int, default=128, help="most tokens of a text")
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is the page
    tokenizer = load_tokenizer(str(arguments.student))
    tasks = read_tasks(DataSource(path="builtin"), "seed_pool", with_response=False)
    requests = [
        Request(render_prompt(tokenizer, tasks[row % len(tasks)].instruction), seed=row)
        for row in range(arguments.rows)
    ]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # frees the GPU's memory for vLLM
        bandwidth = pool.submit(copy_peak, device).result()
    engine = open_engine("auto", str(arguments.student), tokenizer)
    sampling = Sampling(presence_penalty=0.0, max_tokens=arguments.tokens)
    texts: dict[int, Generated] = {}

    def generate() -> None:
        for step in engine.generate(requests, sampling, None):
            texts.update(step.finished)

    generate()  # loads the model, compiles
    started = time.perf_counter()
    generate()
    seconds = time.perf_counter() - started
    tokens, longest = sum(text.tokens for text in texts.values()), max(text.tokens for text in texts.values())
    print(  # noqa: T201
        f"{type(engine).__name__}, {arguments.rows} rows, {tokens} tokens: {tokens / seconds:.0f} tokens per second"
    )
    width = 2 if device.type == "cuda" else getattr(torch, generation_dtype()).itemsize
    least = longest * width * flops.weights_of(arguments.student) / bandwidth
    print(f"by bandwidth: {tokens / least:.0f} tokens per second")  # noqa: T201


if __name__ == "__main__":
    main()
