"""Check influence and training on a GPU and measure their speed, on a machine with CUDA.

    python benchmarks/gpu.py [--minutes 14] [--out FILE] [--student DIR] [--shapes 8b 1b 135m] [--dtypes mixed bfloat16]

Each step is a program of this folder in a process of its own, so that it has the whole GPU and a failure ends only this step.
The most wanted come first: the first of --shapes in the first of --dtypes; the checks; the other shapes; generation; the
other dtypes; the published procedure. When --minutes are over, the step that runs is stopped, and the others are skipped.

The program prints a Markdown section with date, hardware and versions, and appends it to --out, each line as soon as it is
known. The exit code is 1 if a step or a check failed.
"""

import argparse
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from montessori_core.errors import UserError
from montessori_core.models.embedded import fetch_embedded

_GRACE = 20.0  # seconds in which a stopped step removes its files


@dataclass(frozen=True)
class Step:
    """A program of this folder and its options; `on_student`: it also needs a model's folder."""

    title: str
    script: str
    options: tuple[str, ...] = ()
    on_student: bool = False


class StepFailed(Exception):
    """A step ended with an error, which is on stderr."""


def main() -> None:
    """Run all steps, and print and append the section."""
    arguments = parse_arguments()
    # Only counts the GPUs: with a context, this process would keep memory that the steps need.
    if not arguments.allow_cpu and not torch.cuda.is_available():
        raise SystemExit(
            "benchmarks/gpu.py needs a GPU, and torch finds none: start it on a machine with CUDA and a CUDA build of torch "
            f"(this is {torch.__version__}). benchmarks/influence.py also runs on a CPU."
        )
    deadline = time.monotonic() + 60 * arguments.minutes
    say = partial(append, arguments.out)
    say(f"\n## On a GPU\n\n`python benchmarks/gpu.py`, {time.strftime('%Y-%m-%d')}.")
    failures = []
    for step in steps(arguments):
        say(f"\n### {step.title}\n")
        try:
            run_step(step, arguments.student, deadline, say)
        except StepFailed as error:
            say(f"\n**failed**: {error}")
            failures.append(f"* {step.title}: {error}")
    if failures:
        say("\n### Failed\n\n" + "\n".join(failures))
        raise SystemExit(1)


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=math.inf, help="time for all steps (default: no limit)")
    parser.add_argument("--out", type=Path, help="Markdown file to append the section to")
    parser.add_argument("--student", type=Path, help="model folder for the checks (default: the embedded model)")
    parser.add_argument("--shapes", nargs="+", default=["8b", "1b", "135m"], help="students with random weights")
    parser.add_argument("--dtypes", nargs="+", default=["mixed", "bfloat16", "float32"], help="their numbers")
    parser.add_argument("--states", nargs="+", default=["bfloat16"], help="what moments and gradients are kept in")
    parser.add_argument("--estimators", nargs="+", default=["linear", "first_order", "exact"])
    parser.add_argument("--references", type=int, default=256, help="number of reference examples")
    parser.add_argument("--allow-cpu", action="store_true", help="also run without a GPU, to test these programs")
    return parser.parse_args()


def steps(arguments: argparse.Namespace) -> list[Step]:
    """Return the steps, the most wanted first."""
    wanted, *other_shapes = arguments.shapes
    first, *other_dtypes = arguments.dtypes
    references = ("--references", str(arguments.references))

    def students(shapes: list[str], dtypes: list[str]) -> list[Step]:
        if not shapes or not dtypes:
            return []
        options = ("--shapes", *shapes, "--dtypes", *dtypes, "--states", *arguments.states)
        options = (*options, "--estimators", *arguments.estimators, *references)
        title = f"Students with random weights: {', '.join(shapes)} in {', '.join(dtypes)}"
        return [Step(title, "influence_shapes.py", options)]

    return [
        Step("Machine", "machine.py"),
        *students([wanted], [first]),
        Step("Checks", "gpu_checks.py", on_student=True),
        *students(other_shapes, [first]),
        Step("Generation", "generation_speed.py", on_student=True),
        *(step for shape in arguments.shapes for step in students([shape], other_dtypes)),
        Step("Beside the published procedure, fp32", "influence.py", references, on_student=True),
    ]


def run_step(step: Step, student: Path | None, deadline: float, say: Callable[[str], None]) -> None:
    """Run a step and say its lines as it prints them, or say why it does not run or was stopped.

    Args:
        step: the step.
        student: model folder; None for the embedded model.
        deadline: `time.monotonic` at which the step is stopped.
        say: prints a line.

    Raises:
        StepFailed: it failed.
    """
    if time.monotonic() >= deadline:
        return say("skipped: no time left")
    options = list(step.options)
    if step.on_student:
        folder = student or embedded_student()
        if folder is None:
            return say("not checked: the embedded model is not here and cannot be downloaded; give --student DIR")
        options += ["--student", str(folder)]
    command = [sys.executable, "-u", str(Path(__file__).parent / step.script), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        timer = threading.Timer(min(deadline - time.monotonic(), threading.TIMEOUT_MAX), stop, [process])
        timer.start()
        try:
            for line in process.stdout:
                say(line.rstrip("\n"))
            process.wait()
        finally:
            timer.cancel()
    if process.returncode and time.monotonic() >= deadline:
        return say("\nstopped: no time left")
    if process.returncode:
        raise StepFailed(f"{step.script} ended with code {process.returncode}")
    return None


def stop(process: "subprocess.Popen[str]") -> None:
    """Interrupt a process, so that it ends its jobs and removes its files; kill it if it does not end."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()


@cache
def embedded_student() -> Path | None:
    """Return the folder of the embedded model; None if it is not available, with the reason on stderr."""
    try:
        return fetch_embedded()
    except UserError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return None


def append(path: Path | None, text: str) -> None:
    """Print a part of the section, and append it to a file."""
    print(text, flush=True)  # noqa: T201
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")


if __name__ == "__main__":
    main()
