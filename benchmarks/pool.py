"""Measure the influence of pools of up to 100,000 examples with a small student, on Slurm or on this machine.

    eval "$(docker/slurm/lab.sh env)"; python benchmarks/pool.py --profile slurm [--examples 1000 10000 100000] [--folder .]

Each pool is measured by `montessori influence`, linear and to first order, in two jobs of one core. The driver of the largest
pool is killed (SIGKILL) when a third of its rows are done, and the same command resumes. Peak memory is the driver's. Seconds
an example are the jobs' own, as they record them. Beside it, *naive*, the published procedure, for one example (see
`influence.py`). The student has random weights: only its size, 3.4M parameters of which 3.1M are embeddings, matters here.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
import yaml
from influence import measure_naive, random_example, random_moments
from transformers import LlamaConfig, LlamaForCausalLM

from cluster.records import Manifest, read_record
from cluster.stage import describe
from montessori_core.data.tables import INFLUENCE, read_table
from montessori_core.influence.table import read_measured
from montessori_core.models.embedded import fetch_embedded
from montessori_core.models.load import load_tokenizer
from montessori_core.training.moments import save_moments

REFERENCES = 32
KILLED_AT = 1 / 3


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, nargs="+", default=[1000, 10_000, 100_000], help="sizes of the pools")
    parser.add_argument("--estimators", nargs="+", default=["linear", "first_order"])
    parser.add_argument("--profile", choices=["local", "slurm"], default="local", help="where jobs run")
    parser.add_argument("--folder", type=Path, default=Path(), help="parent of the scratch folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch).resolve()
        prepare(folder, arguments.profile)
        references = [random_example(40) for _ in range(REFERENCES)]
        naive = measure_naive(folder / "student", random_example(40), references, 4, torch.device("cpu"))
        print(f"naive: {naive:.2f} s an example")  # noqa: T201
        print("\n| estimator | examples | shards | s | job s an example | driver's peak, MB | kept of the killed |")  # noqa: T201
        print("|---|---|---|---|---|---|---|")  # noqa: T201
        for estimator in arguments.estimators:
            for count in arguments.examples:
                row = measure(folder, estimator, count, killed=count == max(arguments.examples))
                print(f"| {estimator.replace('_', ' ')} | {row} |", flush=True)  # noqa: T201


def prepare(folder: Path, profile: str) -> None:
    """Write a student with moments, the reference set and the cluster file."""
    load_tokenizer(str(fetch_embedded())).save_pretrained(folder / "student")
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=49152, tie_word_embeddings=True))
    model.save_pretrained(folder / "student")
    save_moments(random_moments(model), folder / "student")
    (folder / "reference.jsonl").write_text("\n".join(json.dumps(example(-i)) for i in range(REFERENCES)))
    resources = {"influence": {"parallel_jobs": 2, "cpus_per_process": 1, "memory_gb": 4}}
    (folder / "cluster.yaml").write_text(yaml.safe_dump({"profile": profile, "resources": resources}))


def example(number: int) -> dict[str, str]:
    """Return a short example that occurs once."""
    words = ("river", "stone", "seven", "window", "bright", "count", "letter", "north")
    text = " ".join(words[(number // 8**place) % 8] for place in range(6))
    return {"instruction": f"Say something about {text}.", "output": f"Number {number}: {text}, and nothing else."}


def measure(folder: Path, estimator: str, count: int, killed: bool) -> str:
    """Measure one pool; return the cells of its line."""
    pool, out = folder / f"pool-{count}.jsonl", folder / f"{estimator}-{count}.parquet"
    if not pool.exists():
        pool.write_text("\n".join(json.dumps(example(number)) for number in range(count)))
    student = str(folder / "student")
    command = [sys.executable, "-m", "flows.cli", "influence", "--student", student, "--warm-state", student]
    command += ["--examples", str(pool), "--reference", str(folder / "reference.jsonl"), "--out", str(out)]
    command += ["--estimator", estimator, "--cluster", str(folder / "cluster.yaml"), "--max-length", "128"]
    stage = Path(f"{out}.parts") / estimator
    seconds, peak, kept = 0.0, 0, "-"
    if killed:
        seconds, peak = drive(command, stage, KILLED_AT)
        kept = f"{len(list(stage.glob('*.manifest.json')))} shards"
    more, other = drive(command, stage)
    assert read_table(out, INFLUENCE).num_rows == read_measured(out).num_rows == count
    manifests = [read_record(path, Manifest) for path in stage.glob("*.manifest.json")]
    busy = sum(manifest.seconds for manifest in manifests if manifest) / count
    cells = (f"{count:,}", len(manifests), f"{seconds + more:.0f}", f"{busy:.4f}", max(peak, other) // 10**6, kept)
    return " | ".join(map(str, cells))


def drive(command: list[str], stage: Path, until: float | None = None) -> tuple[float, int]:
    """Run a driver, or kill it when this share of the shards is done; return seconds and its peak memory, bytes."""
    started, peak = time.monotonic(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as driver:
        process = psutil.Process(driver.pid)
        while driver.poll() is None:
            try:
                peak = max(peak, process.memory_info().rss)
            except psutil.Error:
                break
            done = len(list(stage.glob("*.manifest.json")))
            if until and done and done >= until * describe(stage).shards:
                driver.send_signal(signal.SIGKILL)
                return time.monotonic() - started, peak
            time.sleep(0.5)
        _, errors = driver.communicate()
    if driver.returncode:
        raise SystemExit(errors)
    return time.monotonic() - started, peak


if __name__ == "__main__":
    main()
