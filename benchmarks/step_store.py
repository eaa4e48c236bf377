"""Compare influence from kept steps with first order: agreement and cost, in one run.

    python benchmarks/step_store.py --student DIR --warm-state DIR --examples FILE [--targets builtin/coding builtin/maths]

The student is a warm one with AdamW's moments, such as a run's iteration-1/warmup/part-00000. Each example's step is
projected onto the reference gradients of the targets (first order), and onto random directions of several sizes (`montessori
influence --store`). Spearman and error compare the influence estimated from kept steps with that of first order; the error is
the root mean square, as a share of the spread of influence, after the difference of the medians, which an audit corrects, is
taken out. Seconds are the processor's.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from scipy.stats import spearmanr

from montessori_core.config import DataSource
from montessori_core.data.sources import read_tasks
from montessori_core.influence import AdamW, ReferenceSet, ResidentStudent
from montessori_core.influence.losses import make_batch
from montessori_core.influence.projections import AlongDirections
from montessori_core.influence.reference_state import ReferenceState
from montessori_core.models.chat import encode_example
from montessori_core.models.load import load_with_tokenizer
from montessori_core.training.moments import load_moments

CPU = torch.device("cpu")
Result = TypeVar("Result")


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, required=True, help="folder of the warm student")
    parser.add_argument("--warm-state", type=Path, required=True, help="folder with its moments")
    parser.add_argument("--examples", required=True, help="examples to measure")
    parser.add_argument("--targets", nargs="+", default=["builtin/coding", "builtin/maths"], help="reference sets")
    parser.add_argument("--limit", type=int, default=96, help="number of examples")
    parser.add_argument("--references", type=int, default=24, help="reference examples of a target")
    parser.add_argument("--numbers", type=int, nargs="+", default=[4096, 16384, 65536], help="numbers of a step")
    parser.add_argument("--rate", type=float, default=5e-5, help="learning rate of the step")
    parser.add_argument("--max-length", type=int, default=192)
    arguments = parser.parse_args()
    tokenizer, model = load_with_tokenizer(str(arguments.student), torch.float32)
    moments = load_moments(arguments.warm_state)
    adamw = AdamW(arguments.rate, 0.9, 0.999, 1e-8, 0.0, moments.step + 1, 1 / 32)
    student = ResidentStudent(model, moments, adamw, CPU)

    def encoded(path: str, limit: int, name: str) -> list[Any]:
        tasks = read_tasks(DataSource(path=path), name, True)[:limit]
        return [encode_example(tokenizer, task.instruction, task.response, arguments.max_length) for task in tasks]

    states, opening = [], 0.0
    for target in arguments.targets:
        reference = ReferenceSet(encoded(target, arguments.references, "reference"), 512, CPU)
        state, seconds = timed(lambda: ReferenceState.measure(student, reference, "first_order", "example"))  # noqa: B023
        states.append(state)
        opening = seconds
    gradients = [state.gradient.full for state in states if state.gradient]
    examples = [e for e in encoded(arguments.examples, arguments.limit, "examples") if e.response_tokens]
    batches = [[make_batch([(0, example)], CPU) for example in examples[i : i + 4]] for i in range(0, len(examples), 4)]

    def projected(projection: Any) -> tuple[np.ndarray, float]:
        """Return [examples, numbers] projections of the steps against the null step, and seconds an example."""
        null = student.project_null_step(projection)
        steps, seconds = timed(lambda: [s for batch in batches for _, s in student.project_steps(batch, projection)])
        return (torch.stack(steps) - null).numpy(), seconds / len(examples)

    first_order, seconds = projected(AlongDirections(gradients))
    print(f"{len(examples)} examples; {len(gradients)} targets of {arguments.references}; opening one: {opening:.1f} s")  # noqa: T201
    columns = " | ".join(f"{target}: Spearman, error" for target in arguments.targets)
    print(f"\n| kept of a step | s an example | {columns} | s of another target |")  # noqa: T201
    print("|---|---|---|" + "---|" * len(gradients))  # noqa: T201
    print(f"| nothing (first order) | {seconds:.2f} |" + " |" * len(gradients) + f" {seconds:.2f} an example |")  # noqa: T201
    for numbers in arguments.numbers:
        directions = student.random_directions(numbers)
        kept, seconds = projected(directions)
        scales = np.abs(kept).max(axis=1, keepdims=True)
        halves = (kept / scales).astype(np.float16)
        cells = []
        for column, gradient in enumerate(gradients):
            target = student.project_gradient(directions, gradient).numpy()
            estimate, product = timed(lambda: scales[:, 0] * (halves.astype(np.float64) @ target))  # noqa: B023
            cells.append(agreement(first_order[:, column], estimate))
        size = f"{directions.size:,} numbers, {2 * directions.size / 1024:.0f} kB"
        last = f"{product / len(examples):.1e} an example"
        print(f"| {size} | {seconds:.2f} | {' | '.join(cells)} | {last} |", flush=True)  # noqa: T201


def agreement(true: np.ndarray, estimate: np.ndarray) -> str:
    """Return rank correlation and error of an estimate."""
    errors = estimate - true
    error = np.sqrt(np.mean((errors - np.median(errors)) ** 2)) / true.std()
    return f"{spearmanr(true, estimate).statistic:.3f}, {error:.0%}"


def timed(function: Callable[[], Result]) -> tuple[Result, float]:
    """Return a result and the processor's seconds."""
    started = time.process_time()
    return function(), time.process_time() - started


if __name__ == "__main__":
    main()
