"""Measure how other work on a machine slows down generation and a student's step, by how long idle threads spin.

    python benchmarks/busy_machine.py --student DIR [--rounds 3]

torch's threads wait for each other several times in every layer. A thread that waits spins first, then sleeps. When another
process takes a core for a moment, threads on other cores spin until it gives the core back. They count as busy, so that the
scheduler prefers none of them afterwards. GOMP_SPINCOUNT bounds the spinning; jobs set it (`cluster.worker`). Beside no, one
and two other processes, the settings take turns. Seconds are those of the better half of the rounds.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from machine import describe_machine, timed

from montessori_core.config import DataSource, Sampling
from montessori_core.data.sources import read_tasks
from montessori_core.influence.losses import TokenLosses, example_loss, make_batch
from montessori_core.models.chat import encode_example
from montessori_core.models.load import load_model, load_tokenizer
from montessori_core.models.rendering import render_prompt
from montessori_core.synthesis.engine import Request
from montessori_core.synthesis.generation import open_engine

SPINS = ("", "3000", "1000")
"""Values of GOMP_SPINCOUNT; empty: as libgomp has it."""
CPU = torch.device("cpu")


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, required=True, help="model folder")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of every measurement")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(*measure(arguments.student))  # noqa: T201
        return
    print(f"{describe_machine()}\n")  # noqa: T201
    print("| other processes | spins | generation, s | passes of a student, s |\n|---|---|---|---|")  # noqa: T201
    for others in range(3):
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)]
        try:
            rounds = [[measure_with(spins, arguments.student) for spins in SPINS] for _ in range(arguments.rounds)]
        finally:
            for process in busy:
                process.kill()
        for spins, pairs in zip(SPINS, zip(*rounds, strict=True), strict=True):
            seconds = [statistics.mean(sorted(column)[: (len(column) + 1) // 2]) for column in zip(*pairs, strict=True)]
            cells = " | ".join(f"{value:.2f}" for value in seconds)
            print(f"| {others} | {spins or 'default'} | {cells} |", flush=True)  # noqa: T201


def measure_with(spins: str, student: Path) -> list[float]:
    """Return the seconds of a new process with a bound on spinning."""
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    command = [sys.executable, __file__, "--student", str(student), "--measure"]
    environment |= {"GOMP_SPINCOUNT": spins} if spins else {}
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [float(word) for word in output.split()]


def measure(student: Path) -> tuple[float, float]:
    """Return the seconds of the second of two generations and of two passes forward and backward."""
    tokenizer = load_tokenizer(str(student))
    tasks = read_tasks(DataSource(path="builtin"), "reference", with_response=True)[:4]
    requests = [Request(render_prompt(tokenizer, task.instruction), seed=row) for row, task in enumerate(tasks)]
    engine = open_engine("transformers", str(student), tokenizer)
    model = load_model(str(student), torch.float32)
    encoded = encode_example(tokenizer, tasks[0].instruction, tasks[0].response, 128)

    def generate() -> None:
        list(engine.generate(requests, Sampling(presence_penalty=0.0, max_tokens=24), None))

    def step() -> None:
        example_loss(TokenLosses(model), make_batch([(0, encoded)], CPU)).backward()

    generate()
    step()
    return timed(generate, CPU), timed(step, CPU)


if __name__ == "__main__":
    main()
