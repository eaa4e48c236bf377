"""Compare the start-up cost of local jobs that are forked from the warm process and jobs in a new Python process.

    python benchmarks/warm_start.py [--jobs 5]

Both kinds of jobs alternate, so that other programs on the machine affect them equally. The table has medians. Seconds are
from submission until the program has finished its imports; CPU seconds and private memory are those of the job's rank.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil

from cluster.fanout import fan_out
from cluster.shards import Shards
from cluster.stage import Stage
from cluster.warm_start import warm_process
from montessori_core.config import Cluster, Resources
from montessori_core.data.rows import Rows

PROGRAMS = {
    "nothing": "pass",
    "influence": "import montessori_core.influence.jobs; from transformers import AutoModelForCausalLM, AutoTokenizer",
    "training": "import montessori_core.training.engine; from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer",
}
SOURCE = """
import json, time
import psutil

def open_imports(settings, inputs):
    exec(settings["imports"])
    process = psutil.Process()
    opened = time.time(), sum(process.cpu_times()[:2]), process.memory_full_info().uss
    def compute(rows, output, report):
        output.write_text(json.dumps(opened))
    return compute
"""


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=5, help="jobs per program and kind")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        (folder / "imports_program.py").write_text(SOURCE)
        os.environ["PYTHONPATH"] = f"{folder}{os.pathsep}{Path(__file__).resolve().parent.parent}"
        first = measure(folder / "first", "nothing", None)[0]
        lines = [
            "| what the program imports | forked: s, CPU s, private MB | new Python: s, CPU s, private MB |",
            "|---|---|---|",
        ]
        for name in PROGRAMS:
            forked, new = [], []
            for number in range(arguments.jobs):
                forked.append(measure(folder / f"{name}-forked-{number}", name, None))
                new.append(measure(folder / f"{name}-new-{number}", name, sys.executable))
            lines.append(f"| {name} | {medians(forked)} | {medians(new)} |")
        warm = psutil.Process(warm_process().pid)
        memory = warm.memory_full_info()
        lines.append(
            f"\nThe warm process takes {sum(warm.cpu_times()[:2]):.1f} CPU seconds once, and the first job waited "
            f"{first:.1f} s for it; it holds {memory.rss / 1e6:.0f} MB."
        )
    print("\n".join(lines))  # noqa: T201


def measure(folder: Path, program: str, python: str | None) -> tuple[float, float, float]:
    """Run one job; return the seconds, CPU seconds and private megabytes until its program has opened."""
    stage = Stage("imports", 1, "imports_program:open_imports", {"imports": PROGRAMS[program]}, {}, {}, folder, ".json")
    submitted = time.time()
    [part] = fan_out(
        stage, Shards(Rows.of([{"n": 0}]), 1), Resources(cpus_per_process=1), Cluster(poll_seconds=0.05), python=python
    )
    opened, processor, memory = json.loads(part.read_text())
    return opened - submitted, processor, memory / 1e6


def medians(jobs: list[tuple[float, float, float]]) -> str:
    """Return the median of each column as text."""
    seconds, processor, memory = (statistics.median(column) for column in zip(*jobs, strict=True))
    return f"{seconds:.2f}, {processor:.2f}, {memory:.0f}"


if __name__ == "__main__":
    main()
