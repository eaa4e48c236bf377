"""Check influence and training on a GPU, in the deterministic mode of jobs.

    python benchmarks/gpu_checks.py --student DIR

The student is bit-identical after any number of examples; influence is bit-identical in any order; the GPU agrees with the
CPU; first order agrees with exact, linear with first order; training in two processes with ZeRO-3 agrees with one. The exit
code is 1 if one of these failed. Whether first order and bfloat16 repeat to the last bit, too, is only reported. Each line of
the Markdown table is printed as soon as it is known.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr

from montessori_core.config import Cluster, DataSource, Resources, Warmup, Zero
from montessori_core.data.rows import Rows
from montessori_core.data.sources import read_tasks
from montessori_core.influence import AdamW, InfluenceMeter, Measurement, ReferenceSet, ResidentStudent
from montessori_core.influence.linear import LinearMeter
from montessori_core.influence.losses import TokenLosses, example_loss, make_batch
from montessori_core.models.chat import Encoded, encode_example
from montessori_core.models.device import compute_device
from montessori_core.models.load import load_model, load_tokenizer
from montessori_core.programs import SFT, Sft
from montessori_core.training.moments import Moments, number_type

RATE, LIGHT = 1e-5, 1 / 32


@dataclass(frozen=True)
class Check:
    """A check.

    Attributes:
        name: what is checked.
        good: whether it passed; None if it is not possible here.
        measured: the measured value.
        required: whether the program fails if it did not pass.
    """

    name: str
    good: bool | None
    measured: str
    required: bool = True

    def row(self) -> str:
        """Return the row of the table."""
        passed = {True: "yes", False: "**no**" if self.required else "no", None: "not checked"}[self.good]
        return f"| {self.name} | {passed} | {self.measured} |"


@dataclass(frozen=True)
class WarmStudent:
    """A student after a few training steps, its AdamW moments, and examples."""

    folder: Path
    weights: dict[str, torch.Tensor]
    moments: Moments
    reference: list[Encoded]
    probing: list[Encoded]

    def model(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
        """Return the model on a device."""
        model = load_model(str(self.folder), dtype)
        model.load_state_dict(self.weights, strict=False)
        return model.to(device)

    def resident(
        self, model: Any, device: torch.device, weight: float = 1.0, state_dtype: torch.dtype | None = None
    ) -> ResidentStudent:
        """Return the student, whose step gives an example this weight."""
        moments = Moments(dict(self.moments.first), dict(self.moments.second), self.moments.step)
        adamw = AdamW(RATE, 0.9, 0.999, 1e-8, 0.0, moments.step + 1, weight)
        return ResidentStudent(model, moments, adamw, device, state_dtype=state_dtype)

    def measure(
        self,
        device: torch.device,
        examples: Sequence[Encoded],
        estimator: Literal["exact", "first_order"] = "exact",
        weight: float = 1.0,
        dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype | None = None,
    ) -> list[float]:
        """Return the influence of each example on a new copy of the student, nats."""
        student = self.resident(self.model(device, dtype), device, weight, state_dtype)
        return measure_all(InfluenceMeter(student, ReferenceSet(self.reference, 1024, device), estimator), examples)

    def measure_together(self, device: torch.device, examples: Sequence[Encoded], weight: float) -> list[float]:
        """Return the influence of each example with a linear step, all in one batch, nats."""
        model, reference = self.model(device), ReferenceSet(self.reference, 1 << 14, device)
        meter = LinearMeter(model, lambda: self.resident(model, device, weight), reference)
        return list(map(influence_of, meter.measure_batch(examples)))


def measure_all(meter: InfluenceMeter, examples: Sequence[Encoded]) -> list[float]:
    """Return the influence of each example, nats."""
    return [influence_of(meter.measure(example)) for example in examples]


def influence_of(measurement: Measurement) -> float:
    """Return the influence of a measured example, nats."""
    assert measurement.influence_student is not None, measurement.status
    return measurement.influence_student


def main() -> None:
    """Check, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, required=True, help="model folder")
    student = parser.parse_args().student
    print("| check | passed | measured |\n|---|---|---|", flush=True)  # noqa: T201
    failed = False
    for check in run_checks(student, compute_device()):
        print(check.row(), flush=True)  # noqa: T201
        failed |= check.required and check.good is False
    raise SystemExit(failed)


def run_checks(folder: Path, device: torch.device) -> Iterator[Check]:
    """Run all checks."""
    warm = warm_up(folder, device, steps=4, references=8, probing=12)
    yield from check_influence(warm, device)
    yield from check_repeats(warm, device)
    yield check_sharded_training(folder, device)


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
    student = warm.resident(warm.model(device), device)
    meter = InfluenceMeter(student, ReferenceSet(warm.reference, 1024, device))
    influence = measure_all(meter, warm.probing)
    reversed_order = measure_all(meter, warm.probing[::-1])[::-1]
    changed = [name for name, p in student.parameters.items() if not torch.equal(p.detach().cpu(), warm.weights[name])]
    yield Check(
        "the student is bit-identical after all examples",
        not changed,
        f"{len(changed)} of {len(warm.weights)} tensors differ after {2 * len(warm.probing)} examples",
    )
    fresh = warm.measure(device, warm.probing)
    same = sum(a == b == c for a, b, c in zip(influence, reversed_order, fresh, strict=True))
    yield Check(
        "influence is the same to the last bit in another order and on another worker",
        same == len(influence),
        f"{same} of {len(influence)} examples",
    )
    spread = max(influence) - min(influence)
    on_cpu = warm.measure(torch.device("cpu"), warm.probing[:4])
    yield agreement("the device agrees with the CPU, fp32", influence[:4], on_cpu, spread, 0.01)
    first_order = warm.measure(device, warm.probing, "first_order")
    yield agreement("first order agrees with exact", first_order, influence, spread, 0.25)
    rounded = warm.measure(device, warm.probing, "first_order", state_dtype=torch.bfloat16)
    yield agreement("first order with its state in 16 bits agrees", rounded, first_order, spread, 0.01)
    light = warm.measure(device, warm.probing, "first_order", LIGHT)
    linear = warm.measure_together(device, warm.probing, LIGHT)
    yield agreement("linear agrees with first order at weight 1/32", linear, light, max(light) - min(light), 0.25)


def check_repeats(warm: WarmStudent, device: torch.device) -> Iterator[Check]:
    """Check that first order, and both in bfloat16, repeat in another order and on another worker; none is required."""
    combinations: list[tuple[Literal["exact", "first_order"], torch.dtype]] = [
        ("first_order", torch.float32),
        ("exact", torch.bfloat16),
        ("first_order", torch.bfloat16),
    ]
    for estimator, dtype in combinations:
        influence = warm.measure(device, warm.probing, estimator, dtype=dtype)
        again = warm.measure(device, warm.probing[::-1], estimator, dtype=dtype)[::-1]
        same = sum(a == b for a, b in zip(influence, again, strict=True))
        yield Check(
            f"{estimator.replace('_', ' ')} in {number_type(dtype)} is the same to the last bit in another order",
            same == len(influence),
            f"{same} of {len(influence)} examples",
            required=False,
        )


def agreement(name: str, values: list[float], expected: list[float], spread: float, tolerance: float) -> Check:
    """Check that no value differs from the expected one by more than `tolerance * spread`, and that ranks agree."""
    error = max(abs(a - b) for a, b in zip(values, expected, strict=True)) / spread
    ranks = float(spearmanr(values, expected).statistic)
    return Check(
        name,
        error <= tolerance and ranks >= 0.95,
        f"largest difference {error:.2%} of the spread of influence (at most {tolerance:.0%}), Spearman {ranks:.3f}",
    )


def check_sharded_training(folder: Path, device: torch.device) -> Check:
    """Compare one warm-up epoch in two processes with ZeRO-3, on two GPUs or the CPU, with one process without it."""
    name = "ZeRO-3 in two processes trains as one process does"
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        return Check(name, None, f"needs two GPUs, {torch.cuda.device_count()} here")
    with tempfile.TemporaryDirectory() as scratch:
        single, sharded = (train(folder, Path(scratch) / str(processes), processes, device) for processes in (1, 2))
    start = load_model(str(folder), torch.float32).state_dict()
    largest_change = max(float((single[key] - start[key]).abs().max()) for key in single)
    error = max(float((single[key] - sharded[key]).abs().max()) for key in single) / largest_change
    return Check(name, error <= 0.01, f"largest difference {error:.2%} of the largest change of a weight (at most 1%)")


def train(folder: Path, scratch: Path, processes: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return the weights after a warm-up on eight examples."""
    from cluster.fanout import fan_out  # imports submitit, which the other checks do not need
    from cluster.shards import Shards
    from cluster.stage import Stage

    recipe = Warmup(learning_rate=RATE, batch_size=4, micro_batch_size=2).shared()
    zero = Zero(stage=3 if processes > 1 else 0)
    settings = Sft(max_length=256, lora=None, recipe=recipe, zero=zero, seed=0, save_moments=False)
    tasks = read_tasks(DataSource(path="builtin", limit=8), "reference", with_response=True)
    rows = [{"instruction": task.instruction, "response": task.response, "response_finished": True} for task in tasks]
    stage = Stage.of(SFT, settings, scratch, {"student": folder}, {})
    gpus = processes if device.type == "cuda" else 0
    resources = Resources(processes_per_node=processes, gpus_per_node=gpus, cpus_per_process=1)
    (part,) = fan_out(stage, Shards(Rows.of(rows), len(rows)), resources, Cluster())
    weights: dict[str, torch.Tensor] = load_file(part / "model.safetensors")
    return weights


if __name__ == "__main__":
    main()
