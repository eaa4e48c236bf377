"""Compare stages whose jobs wait in Slurm's queue with stages that share held jobs (`cluster.slurm.hold`).

    python benchmarks/held_jobs.py [--stages 12] [--shards 4] [--wait 60] [--cluster FILE]

Run it on a login node. Jobs compute nothing but the square of a number, so that what is measured is queueing and starting.
`--wait` delays each submission by that many seconds (`sbatch --begin`), on top of the queue's own wait.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from cluster.fanout import fan_out
from cluster.lock import only_driver
from cluster.shards import Shards
from cluster.stage import Stage
from montessori_core.config import Cluster, HeldJobs
from montessori_core.config.cluster import read_cluster
from montessori_core.data.rows import Rows

SOURCE = """
import json

def open_squares(settings, inputs):
    def compute(rows, output, report):
        output.write_text(json.dumps([row["n"] ** 2 for row in rows]))
    return compute
"""


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=12, help="number of stages, one after another")
    parser.add_argument("--shards", type=int, default=4, help="shards and parallel jobs of a stage")
    parser.add_argument("--wait", type=int, default=60, help="seconds that a job waits in the queue at least")
    parser.add_argument(
        "--cluster", type=Path, help="cluster file; if not set, the defaults of `cluster`, which ask for GPUs"
    )
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="folder that nodes see")
    arguments = parser.parse_args()
    given = Cluster() if arguments.cluster is None else read_cluster(arguments.cluster)
    lines = ["| jobs | s | s a stage |", "|---|---|---|"]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch).resolve()
        (folder / "squares_program.py").write_text(SOURCE)
        os.environ["PYTHONPATH"] = f"{folder}{os.pathsep}{Path(__file__).resolve().parent.parent}"
        for name, hold in (("of each stage", None), ("held between stages", HeldJobs())):
            seconds = measure(folder / name.replace(" ", "-"), delayed(given, arguments.wait, hold), arguments)
            lines.append(f"| {name} | {seconds:.0f} | {seconds / arguments.stages:.1f} |")
    print("\n".join(lines))  # noqa: T201


def delayed(given: Cluster, wait: int, hold: HeldJobs | None) -> Cluster:
    """Return a Slurm cluster whose jobs wait."""
    slurm = given.slurm.model_copy(update={"extra": {**given.slurm.extra, "begin": f"now+{wait}seconds"}, "hold": hold})
    return given.model_copy(update={"profile": "slurm", "slurm": slurm})


def measure(folder: Path, cluster: Cluster, arguments: argparse.Namespace) -> float:
    """Return the seconds of the stages."""
    folder.mkdir()
    resources = cluster.resources.influence.model_copy(update={"parallel_jobs": arguments.shards})
    rows = Rows.of([{"n": number} for number in range(arguments.shards)])
    started = time.monotonic()
    with only_driver(folder):
        for number in range(arguments.stages):
            stage = Stage("squares", 1, "squares_program:open_squares", {}, {}, {}, folder / f"stage-{number}", ".json")
            parts = fan_out(stage, Shards(rows, 1), resources, cluster)
            squares = [value for part in parts for value in json.loads(part.read_text())]
            if squares != [number**2 for number in range(arguments.shards)]:
                raise SystemExit(f"{folder}: wrong results")
    return time.monotonic() - started


if __name__ == "__main__":
    main()
