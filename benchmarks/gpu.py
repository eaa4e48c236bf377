"""Check influence and training on a GPU and measure their speed, on a machine with CUDA.

    python benchmarks/gpu.py [--out docs/benchmarks.md] [--llama-8b]

Checks on the embedded SmolLM2-135M: the student is bit-identical after any number of examples; influence is bit-identical in
any order; the GPU agrees with the CPU; first order agrees with exact; training on two GPUs with ZeRO-3 agrees with one (if
there are two). Then the program runs benchmarks/influence.py on the GPU. It prints a Markdown section with date, hardware and
versions, and appends it to --out. The exit code is 1 if a check failed.
"""

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr

from cluster.fanout import fan_out
from cluster.shards import Shards
from cluster.stage import Stage
from montessori_core.config import Cluster, DataSource, Resources, Warmup, Zero
from montessori_core.data.rows import Rows
from montessori_core.data.sources import read_tasks
from montessori_core.influence import AdamW, InfluenceMeter, ReferenceSet, ResidentStudent
from montessori_core.influence.losses import TokenLosses, example_loss, make_batch
from montessori_core.models.chat import Encoded, encode_example
from montessori_core.models.embedded import fetch_embedded
from montessori_core.models.load import load_model, load_tokenizer
from montessori_core.programs import SFT, Sft
from montessori_core.training.moments import Moments

RATE = 1e-5
_SPEED: dict[str, list[str]] = {
    "SmolLM2-135M, fp32": [],
    "SmolLM2-135M, weights in fp32 and arithmetic in bf16": ["--dtype", "mixed", "--skip-naive"],
}
_SPEED_8B = {"Llama-3-8B's shape, bf16": ["--llama-8b", "--dtype", "bfloat16", "--skip-naive"]}


@dataclass(frozen=True)
class Check:
    """A check, whether it passed (None: not possible here), and the measured value."""

    name: str
    good: bool | None
    measured: str


@dataclass(frozen=True)
class WarmStudent:
    """A student after a few training steps, its AdamW moments, and examples."""

    folder: Path
    weights: dict[str, torch.Tensor]
    moments: Moments
    reference: list[Encoded]
    probing: list[Encoded]

    def resident(self, device: torch.device) -> ResidentStudent:
        """Return a copy of the student as a `ResidentStudent`."""
        model = load_model(str(self.folder), torch.float32)
        model.load_state_dict(self.weights, strict=False)
        moments = Moments(dict(self.moments.first), dict(self.moments.second), self.moments.step)
        adamw = AdamW(RATE, 0.9, 0.999, 1e-8, 0.0, moments.step + 1)
        return ResidentStudent(model.to(device), moments, adamw, device)

    def measure(
        self,
        student: ResidentStudent,
        examples: Sequence[Encoded],
        estimator: Literal["exact", "first_order"] = "exact",
    ) -> list[float]:
        """Return the influence of each example, nats."""
        meter = InfluenceMeter(student, ReferenceSet(self.reference, 1024, student.device), estimator)
        return [float(meter.measure(example).influence_student) for example in examples]  # type: ignore[arg-type]


def main() -> None:
    """Check, measure, and print or append the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file to append the section to")
    parser.add_argument("--llama-8b", action="store_true", help="also measure a student of Llama-3-8B's shape (80 GB)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            "benchmarks/gpu.py needs a GPU, and torch finds none: start it on a machine with CUDA and a CUDA build of torch "
            f"(this is {torch.__version__}). benchmarks/influence.py also runs on a CPU."
        )
    device = torch.device("cuda")
    folder = fetch_embedded()
    warm = warm_up(folder, device, steps=4, references=16, probing=12)
    checks = list(check_influence(warm, device))
    checks.append(check_sharded_training(folder, torch.cuda.device_count()))
    speeds = {
        name: measure_speed(options) for name, options in (_SPEED | (_SPEED_8B if arguments.llama_8b else {})).items()
    }
    section = render_section(hardware(), checks, speeds)
    if arguments.out:
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(f"\n{section}")
    print(section)  # noqa: T201
    raise SystemExit(any(check.good is False for check in checks))


def warm_up(folder: Path, device: torch.device, steps: int, references: int, probing: int) -> WarmStudent:
    """Train a student for a few steps on the built-in reference examples."""
    tokenizer = load_tokenizer(str(folder))
    tasks = read_tasks(DataSource(path="builtin", limit=steps + references + probing), "reference", with_response=True)
    examples = [encode_example(tokenizer, task.instruction, task.response, 256) for task in tasks]
    model = load_model(str(folder), torch.float32).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    losses = TokenLosses(model)
    for example in examples[:steps]:
        example_loss(losses, make_batch([(0, example)], device)).backward()
        optimizer.step()
        optimizer.zero_grad()
    named = dict(model.named_parameters())
    moments = Moments(
        {name: optimizer.state[parameter]["exp_avg"].cpu() for name, parameter in named.items()},
        {name: optimizer.state[parameter]["exp_avg_sq"].cpu() for name, parameter in named.items()},
        steps,
    )
    weights = {name: parameter.detach().cpu() for name, parameter in named.items()}
    return WarmStudent(folder, weights, moments, examples[steps : steps + references], examples[steps + references :])


def check_influence(warm: WarmStudent, device: torch.device) -> Iterator[Check]:
    """Check that the student is restored, influence is repeatable and equals the CPU's, and first order is near exact."""
    student = warm.resident(device)
    influence = warm.measure(student, warm.probing)
    reversed_order = warm.measure(student, warm.probing[::-1])[::-1]
    changed = [name for name, p in student.parameters.items() if not torch.equal(p.detach().cpu(), warm.weights[name])]
    yield Check(
        "the student is bit-identical after all examples",
        not changed,
        f"{len(changed)} of {len(warm.weights)} tensors differ after {2 * len(warm.probing)} examples",
    )
    fresh = warm.measure(warm.resident(device), warm.probing)
    same = sum(a == b == c for a, b, c in zip(influence, reversed_order, fresh, strict=True))
    yield Check(
        "influence is the same to the last bit in another order and on another worker",
        same == len(influence),
        f"{same} of {len(influence)} examples",
    )
    spread = max(influence) - min(influence)
    on_cpu = warm.measure(warm.resident(torch.device("cpu")), warm.probing)
    yield agreement("the device agrees with the CPU, fp32", influence, on_cpu, spread, 0.01)
    first_order = warm.measure(warm.resident(device), warm.probing, "first_order")
    yield agreement("first order agrees with exact", first_order, influence, spread, 0.25)


def agreement(name: str, values: list[float], expected: list[float], spread: float, tolerance: float) -> Check:
    """Check that no value differs from the expected one by more than `tolerance * spread`, and that ranks agree."""
    error = max(abs(a - b) for a, b in zip(values, expected, strict=True)) / spread
    ranks = float(spearmanr(values, expected).statistic)
    return Check(
        name,
        error <= tolerance and ranks >= 0.95,
        f"largest difference {error:.2%} of the spread of influence (at most {tolerance:.0%}), Spearman {ranks:.3f}",
    )


def check_sharded_training(folder: Path, gpus: int) -> Check:
    """Compare one warm-up epoch on two GPUs with ZeRO-3 with one GPU without it."""
    name = "ZeRO-3 over two GPUs trains as one GPU does"
    if gpus < 2:
        return Check(name, None, f"needs two GPUs, {gpus} here")
    with tempfile.TemporaryDirectory() as scratch:
        single, sharded = (train(folder, Path(scratch) / str(processes), processes) for processes in (1, 2))
    start = load_file(folder / "model.safetensors")
    largest_change = max(float((single[key] - start[key]).abs().max()) for key in single)
    error = max(float((single[key] - sharded[key]).abs().max()) for key in single) / largest_change
    return Check(name, error <= 0.01, f"largest difference {error:.2%} of the largest change of a weight (at most 1%)")


def train(folder: Path, scratch: Path, processes: int) -> dict[str, torch.Tensor]:
    """Return the weights after a warm-up on eight examples."""
    recipe = Warmup(learning_rate=RATE, batch_size=4, micro_batch_size=2).shared()
    zero = Zero(stage=3 if processes > 1 else 0)
    settings = Sft(max_length=256, lora=None, recipe=recipe, zero=zero, seed=0, save_moments=False)
    tasks = read_tasks(DataSource(path="builtin", limit=8), "reference", with_response=True)
    rows = [{"instruction": task.instruction, "response": task.response, "response_finished": True} for task in tasks]
    stage = Stage.of(SFT, settings, scratch, {"student": folder}, {})
    resources = Resources(processes_per_node=processes, gpus_per_node=processes)
    (part,) = fan_out(stage, Shards(Rows.of(rows), len(rows)), resources, Cluster())
    weights: dict[str, torch.Tensor] = load_file(part / "model.safetensors")
    return weights


def measure_speed(options: list[str]) -> str:
    """Return the Markdown that benchmarks/influence.py prints on the GPU."""
    command = [sys.executable, str(Path(__file__).with_name("influence.py")), "--device", "cuda", *options]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    if outcome.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{outcome.stderr[-4000:]}")
    return outcome.stdout


def hardware() -> str:
    """Return GPUs, CUDA and package versions as text."""
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    gpu_text = f"{len(gpus)} x {gpus[0].name} of {gpus[0].total_memory / 2**30:.0f} GiB" if gpus else "no GPU"
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "trl", "deepspeed"))
    return f"{gpu_text}, CUDA {torch.version.cuda}, Python {platform.python_version()}, {versions}"


def render_section(machine: str, checks: Sequence[Check], speeds: dict[str, str]) -> str:
    """Return the section as Markdown."""
    outcomes = {True: "yes", False: "**no**", None: "not checked"}
    lines = [
        "## On a GPU",
        "",
        f"`python benchmarks/gpu.py`, {time.strftime('%Y-%m-%d')}: {machine}.",
        "",
        "| check | passed | measured |",
        "|---|---|---|",
        *(f"| {check.name} | {outcomes[check.good]} | {check.measured} |" for check in checks),
    ]
    for name, markdown in speeds.items():
        lines += ["", f"### {name}", "", markdown.strip()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
