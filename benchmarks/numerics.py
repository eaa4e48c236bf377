"""Compare procedures that measure influence with an fp32 oracle: signs, ranks, errors.

    python benchmarks/numerics.py --examples data.jsonl [--reference FILE] [--student DIR --warm-state DIR]

The program warms the student up (or loads a warm one), measures every probing example with every procedure on the same
reference set, and prints a Markdown table; --out appends it to a file. The oracle is exact influence with fp32 weights, step
and evaluation; --double checks it in fp64. The run takes minutes to hours, because the oracle evaluates the reference set for
each example. Fields of both files: instruction, input, output.
"""

import argparse
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from tqdm import tqdm

from montessori_core.config import DataSource
from montessori_core.data.sources import read_tasks
from montessori_core.influence import AdamW, InfluenceMeter, ReferenceSet, ResidentStudent, SequentialReference
from montessori_core.influence.linear import LinearMeter
from montessori_core.influence.losses import TokenLosses, example_loss, make_batch
from montessori_core.influence.reference import influence_by_example, influence_of
from montessori_core.influence.sequential import is_decided
from montessori_core.models.chat import Encoded, encode_example
from montessori_core.models.embedded import fetch_embedded
from montessori_core.models.load import load_model, load_tokenizer
from montessori_core.training.moments import Moments, load_moments

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setting:
    """A warm student, the reference set and the probing examples."""

    student: Path
    weights: dict[str, torch.Tensor]
    moments: Moments
    adamw: AdamW
    reference: ReferenceSet
    probing: list[Encoded]

    def model(self, dtype: torch.dtype) -> Any:
        """Return a new copy of the warm student."""
        model = load_model(str(self.student), dtype)
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in self.weights.items()}, strict=False)
        return model

    def resident(
        self, dtype: torch.dtype = torch.float32, mixed: bool = False, state_dtype: torch.dtype | None = None
    ) -> ResidentStudent:
        """Return the warm student as a `ResidentStudent`."""
        moments = Moments(self.moments.first, self.moments.second, self.moments.step)
        return ResidentStudent(self.model(dtype), moments, self.adamw, CPU, mixed=mixed, state_dtype=state_dtype)


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    setting = prepare(arguments)
    if arguments.weights:
        publish(
            [f"### {arguments.title}", "", *weights_table(setting, arguments.weights, arguments.seed)], arguments.out
        )
        return
    if arguments.state:
        setting = replace(setting, adamw=replace(setting.adamw, example_weight=1 / 32))
        publish([f"### {arguments.title}", "", *state_table(setting, arguments.seed)], arguments.out)
        return
    oracle_meter = InfluenceMeter(setting.resident(), setting.reference)
    momentum = oracle_meter.null_step_influence
    momentum_by_example = influence_by_example(oracle_meter.student_loss, oracle_meter.null_step_loss, "example")
    differences, oracle_seconds = exact_differences(setting, oracle_meter)
    oracle = differences.mean(1)
    errors = differences.std(1, ddof=1) / len(setting.reference) ** 0.5
    rows: list[list[str]] = []

    def add(name: str, influence: np.ndarray, seconds: float) -> None:
        agreement = compare(oracle[: len(influence)], influence, momentum, oracle_meter.noise_floor)
        rows.append([name, str(len(influence)), *agreement, f"{seconds:.2f}"])

    add("oracle: exact, fp32", oracle, oracle_seconds)
    first_order = InfluenceMeter(setting.resident(), setting.reference, "first_order")
    estimate, seconds = measure(first_order, setting.probing, "first order")
    add("first order, fp32", estimate, seconds)
    if arguments.save:
        np.savez(arguments.save, differences=differences, first_order=estimate, momentum=momentum_by_example.numpy())
    assert first_order.reference_gradient is not None
    reference_gradient = first_order.reference_gradient.full
    if not arguments.brief:
        add_other_precisions(setting, reference_gradient, momentum, add)
    bf16_meter = InfluenceMeter(setting.resident(torch.bfloat16), setting.reference)
    add("(a) exact, bfloat16", *measure(bf16_meter, setting.probing[: arguments.bf16_probing], "bfloat16"))
    if not arguments.brief:
        add("(b) fp32 step, bf16 evaluation", *bf16_evaluation(setting, arguments.bf16_probing))

    lines = [
        f"### {arguments.title}",
        "",
        f"{len(setting.probing)} probing examples, {len(setting.reference)} reference examples, "
        f"{setting.moments.step} warm-up steps, learning rate {setting.adamw.learning_rate:g}, seed {arguments.seed}. "
        f"Influences in [{oracle.min():.2e}, {oracle.max():.2e}]; momentum alone: {momentum:.2e}; standard error "
        f"over the reference examples {np.median(errors):.1e} (median). Noise floor {oracle_meter.noise_floor:.1e} in fp32, "
        f"{bf16_meter.noise_floor:.1e} in bfloat16. A step in bfloat16 changes "
        f"{changed_weights(setting, torch.bfloat16):.1%} of the weights, in fp32 "
        f"{changed_weights(setting, torch.float32):.1%}.",
        "",
        "| procedure | examples | Spearman | sign, student | sign, null step | sign, median | rms error | s / example |",
        "|---|---|---|---|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]
    against_null_step = differences - momentum_by_example.numpy()
    lines += sequential_table(setting, {"student": differences, "null step": against_null_step})
    if arguments.double:
        lines += [double_check(setting, oracle, arguments.double), ""]
    publish(lines, arguments.out)


def publish(lines: list[str], out: Path | None) -> None:
    """Print lines and append them to a file."""
    print("\n".join(lines))  # noqa: T201
    if out:
        with out.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")


def weights_table(setting: Setting, weights: list[float], seed: int) -> list[str]:
    """Compare first order and linear with exact in fp32 at each example weight, and the ranks of all weights."""
    exact: list[np.ndarray] = []
    rows = []
    for weight in weights:
        weighted = replace(setting, adamw=replace(setting.adamw, example_weight=weight))
        influence: dict[str, np.ndarray] = {}
        for estimator in ("exact", "first_order"):
            meter = InfluenceMeter(weighted.resident(), setting.reference, estimator)
            results = [
                meter.measure(example) for example in tqdm(setting.probing, desc=f"{estimator}, weight {weight:g}")
            ]
            influence[estimator] = np.array([result.influence_null_step for result in results], dtype=np.float64)
        linear_meter = LinearMeter(setting.model(torch.float32), weighted.resident, setting.reference)
        linear = np.array([result.influence_null_step for result in linear_meter.measure_batch(setting.probing)])
        exact.append(influence["exact"])
        rows.append(
            [
                f"{weight:g}",
                f"{(influence['exact'] > 0).mean():.0%}",
                f"{np.median([result.dominated_share for result in results]):.1%}",
                f"{influence['exact'].mean():.1e}",
                f"{influence['exact'].std(ddof=1):.1e}",
                *agreement(influence["exact"], influence["first_order"]),
                *agreement(influence["exact"], linear),
                f"{spearmanr(influence['exact'], [result.gradient_norm for result in results]).statistic:.2f}",
                f"{spearmanr(influence['exact'], [e.response_tokens for e in setting.probing]).statistic:.2f}",
            ]
        )
    columns = ["weight", "above the null step", "dominated share", "mean", "sd"]
    columns += ["first order, Spearman", "signs", "rms error", "linear, Spearman", "signs", "rms error"]
    columns += ["Spearman with norm", "with tokens", *(f"with weight {weight:g}" for weight in weights)]
    for row, influence_of_row in zip(rows, exact, strict=True):
        row += [f"{spearmanr(influence_of_row, other).statistic:.2f}" for other in exact]
    return [
        f"{len(setting.probing)} probing examples, {len(setting.reference)} reference examples, {setting.moments.step} "
        f"warm-up steps, learning rate {setting.adamw.learning_rate:g}, seed {seed}; influence against the null step, whose "
        f"influence is {meter.null_step_influence:.2e}; noise floor {meter.noise_floor:.1e}.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def state_table(setting: Setting, seed: int) -> list[str]:
    """Compare each procedure, with the state in fp32 and in bf16, with exact influence in fp32."""
    found: dict[tuple[str, str], np.ndarray] = {}
    for name, mixed in (("exact", False), ("first order", False), ("first order, mixed", True), ("linear", False)):
        for state, dtype in (("float32", None), ("bfloat16", torch.bfloat16)):

            def resident(mixed: bool = mixed, dtype: torch.dtype | None = dtype) -> ResidentStudent:
                return setting.resident(mixed=mixed, state_dtype=dtype)

            meter: InfluenceMeter | LinearMeter
            if name == "linear":
                model = setting.model(torch.float32)
                meter = LinearMeter(model, setting.resident, setting.reference, state_dtype=dtype)
                results = meter.measure_batch(setting.probing)
            else:
                meter = InfluenceMeter(resident(), setting.reference, "exact" if name == "exact" else "first_order")
                results = [meter.measure(example) for example in tqdm(setting.probing, desc=f"{name}, {state}")]
            found[name, state] = np.array([result.influence_null_step for result in results], dtype=np.float64)
    oracle = found["exact", "float32"]
    rows = [
        [
            name,
            state,
            *agreement(oracle, influence),
            f"{np.abs(influence - found[name, 'float32']).max() / oracle.std(ddof=1):.1e}",
            f"{spearmanr(influence, found[name, 'float32']).statistic:.4f}",
        ]
        for (name, state), influence in found.items()
    ]
    columns = ["procedure", "state", "Spearman with exact", "signs", "rms error", "largest change", "Spearman"]
    return [
        f"{len(setting.probing)} probing examples, {len(setting.reference)} reference examples, {setting.moments.step} "
        f"warm-up steps, learning rate {setting.adamw.learning_rate:g}, weight 1/32, seed {seed}; influence against the null "
        f"step, whose standard deviation is {oracle.std(ddof=1):.1e}. The last two columns compare the state in bf16 with "
        "that in fp32; changes are shares of this deviation.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def agreement(exact: np.ndarray, estimate: np.ndarray) -> list[str]:
    """Return Spearman's correlation, the share of equal signs, and the rms error."""
    return [
        f"{spearmanr(exact, estimate).statistic:.4f}",
        f"{((exact > 0) == (estimate > 0)).mean():.3f}",
        f"{np.sqrt(np.mean((estimate - exact) ** 2)):.1e}",
    ]


def add_other_precisions(
    setting: Setting,
    reference_gradient: Mapping[str, torch.Tensor],
    momentum: float,
    add: Callable[[str, np.ndarray, float], None],
) -> None:
    """Add first order in other precisions and with forward mode."""
    mixed = InfluenceMeter(setting.resident(mixed=True), setting.reference, "first_order")
    add("first order, mixed", *measure(mixed, setting.probing, "first order, mixed"))
    del mixed
    add("forward mode", *forward_mode(setting, reference_gradient, momentum))
    bf16 = InfluenceMeter(setting.resident(torch.bfloat16), setting.reference, "first_order")
    add("first order, bfloat16", *measure(bf16, setting.probing, "first order, bfloat16"))


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", required=True, help="file of probing and warm-up examples")
    parser.add_argument("--reference", default="builtin", help="file of reference examples, or 'builtin'")
    parser.add_argument("--response-field", default="output", help="field of --examples that holds the response")
    parser.add_argument("--student", type=Path, help="student folder (default: the embedded model)")
    parser.add_argument("--warm-state", type=Path, help="folder of AdamW moments (default: warm the student up)")
    parser.add_argument("--probing", type=int, default=100, help="number of probing examples")
    parser.add_argument("--bf16-probing", type=int, default=40, help="number of probing examples measured in bf16")
    parser.add_argument("--brief", action="store_true", help="only oracle, first order in fp32, exact in bfloat16")
    parser.add_argument("--weights", type=float, nargs="+", help="compare estimators at these example weights instead")
    parser.add_argument("--state", action="store_true", help="compare moments and gradients in fp32 and bf16 instead")
    parser.add_argument("--references", type=int, default=64, help="number of reference examples")
    parser.add_argument("--warmup-steps", type=int, default=20, help="warm-up steps of 4 examples")
    parser.add_argument(
        "--learning-rate", type=float, default=5e-6, help="of the warm-up (peak) and the influence step"
    )
    parser.add_argument("--max-length", type=int, default=224, help="maximum tokens per example")
    parser.add_argument("--double", type=int, default=0, help="number of examples also measured in fp64")
    parser.add_argument("--save", type=Path, help=".npz file for influence by reference example")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the examples")
    parser.add_argument("--title", default="Agreement with the oracle", help="heading of the table")
    parser.add_argument("--out", type=Path, help="Markdown file to append to")
    return parser.parse_args()


def prepare(arguments: argparse.Namespace) -> Setting:
    """Draw the examples and warm the student up."""
    student = arguments.student or fetch_embedded()
    tokenizer = load_tokenizer(str(student))
    draw = random.Random(arguments.seed)

    def read(path: str, name: str, response_field: str) -> list[Encoded]:
        source = DataSource(path=path, output_field=response_field)
        tasks = read_tasks(source, name, with_response=True)
        encoded = [encode_example(tokenizer, task.instruction, task.response, arguments.max_length) for task in tasks]
        usable = [example for example in encoded if example.response_tokens]
        draw.shuffle(usable)
        return usable

    pool = read(arguments.examples, "examples", arguments.response_field)
    reference = ReferenceSet(read(arguments.reference, "reference", "output")[: arguments.references], 1024, CPU)
    probing, warmup = pool[: arguments.probing], pool[arguments.probing :]
    model = load_model(str(student), torch.float32)
    if arguments.warm_state:
        moments = load_moments(arguments.warm_state)
    else:
        moments = warm_up(model, warmup, arguments.warmup_steps, arguments.learning_rate)
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    adamw = AdamW(arguments.learning_rate, 0.9, 0.999, 1e-8, 0.0, moments.step + 1)
    return Setting(student, weights, moments, adamw, reference, probing)


def warm_up(model: Any, examples: Sequence[Encoded], steps: int, rate: float) -> Moments:
    """Train as the pipeline's warm-up: AdamW, 4 examples per step, linear ramp, gradients clipped to 1."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)
    losses = TokenLosses(model)
    for step in tqdm(range(steps), desc="warm-up"):
        for group in optimizer.param_groups:
            group["lr"] = rate * (step + 1) / steps
        for number in range(4):
            example = examples[(4 * step + number) % len(examples)]
            (example_loss(losses, make_batch([(0, example)], CPU)) / 4).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    state = {name: optimizer.state[p] for name, p in model.named_parameters()}
    return Moments(
        {name: s["exp_avg"] for name, s in state.items()}, {name: s["exp_avg_sq"] for name, s in state.items()}, steps
    )


def exact_differences(setting: Setting, meter: InfluenceMeter) -> tuple[np.ndarray, float]:
    """Return the [probing, references] exact influence on each reference example, and seconds per example."""
    student, before, rows = setting.resident(), meter.student_loss, []
    started = time.perf_counter()
    for example in tqdm(setting.probing, desc="oracle"):
        student.take_step(make_batch([(0, example)], CPU))
        rows.append(influence_by_example(before, setting.reference.evaluate(student.losses), "example").numpy())
        student.restore()
    return np.array(rows), (time.perf_counter() - started) / len(rows)


def measure(meter: InfluenceMeter, probing: list[Encoded], name: str) -> tuple[np.ndarray, float]:
    """Return influence against the student, and seconds per example."""
    started = time.perf_counter()
    influence = [meter.measure(example).influence_student for example in tqdm(probing, desc=name)]
    seconds = (time.perf_counter() - started) / len(probing)
    return np.array([math.nan if value is None else value for value in influence]), seconds


def sequential_table(setting: Setting, differences_against: dict[str, np.ndarray]) -> list[str]:
    """Simulate sequential evaluation on these differences: error rate and tokens saved."""
    lines = [
        "| sequential evaluation | error rate allowed | observed | tokens saved |",
        "|---|---|---|---|",
    ]
    for baseline, differences in differences_against.items():
        for rate in (0.01, 0.05, 0.1, 0.2):
            rule = SequentialReference(setting.reference, 16, rate)
            errors, tokens_read = 0, 0
            for row in torch.from_numpy(differences):
                for look in rule.looks:
                    tokens_read += sum(batch.tokens for batch in look.batches)
                    if is_decided(row[look.seen], len(row), rule.look_error_rate):
                        break
                errors += bool((row[look.seen].mean() > 0) != (row.mean() > 0))
            saved = 1 - tokens_read / (setting.reference.input_tokens * len(differences))
            lines.append(f"| against the {baseline} | {rate:g} | {errors / len(differences):.3f} | {saved:.0%} |")
    return [*lines, ""]


def bf16_evaluation(setting: Setting, count: int) -> tuple[np.ndarray, float]:
    """Measure influence with an fp32 step, whose weights are rounded to bf16 for the evaluation."""
    student, rounded = setting.resident(), setting.model(torch.bfloat16)
    losses, reference = TokenLosses(rounded.eval()), setting.reference
    before = reference.evaluate(losses)
    started, influence = time.perf_counter(), []
    for example in tqdm(setting.probing[:count], desc="bf16 evaluation"):
        student.take_step(make_batch([(0, example)], CPU))
        with torch.no_grad():
            for name, parameter in rounded.named_parameters():
                parameter.copy_(student.parameters[name])
        influence.append(influence_of(before, reference.evaluate(losses), "example")[0])
        student.restore()
    return np.array(influence), (time.perf_counter() - started) / len(influence)


def forward_mode(
    setting: Setting, reference_gradient: Mapping[str, torch.Tensor], momentum: float
) -> tuple[np.ndarray, float]:
    """Measure influence by forward mode, without a gradient per example.

    With AdamW linearised around the null step, influence is the derivative of the example's loss in one direction.
    """
    adamw, moments = setting.adamw, setting.moments
    rate = adamw.learning_rate / (1 - adamw.beta1**adamw.step) * (1 - adamw.beta1)
    model = setting.model(torch.float32).eval()
    model.set_attn_implementation("eager")  # fused attention has no forward mode
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    direction = {}
    for name in parameters:
        second = (moments.second[name] * adamw.beta2 / (1 - adamw.beta2**adamw.step)).sqrt() + adamw.epsilon
        direction[name] = reference_gradient[name] * rate / second

    def losses_of(weights: dict[str, torch.Tensor], batch: Any) -> torch.Tensor:
        logits = torch.func.functional_call(
            model, weights, kwargs={"input_ids": batch.input_ids, "use_cache": False}
        ).logits
        values = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1)[batch.positions], batch.targets, reduction="none"
        )
        summed = torch.zeros(len(batch.indices)).index_add(0, batch.rows, values)
        return summed / torch.bincount(batch.rows)

    def derivative(batch: Any) -> torch.Tensor:
        tangent: torch.Tensor = torch.func.jvp(lambda weights: losses_of(weights, batch), (parameters,), (direction,))[
            1
        ]
        return tangent

    influence = np.zeros(len(setting.probing))
    batches = ReferenceSet(setting.probing, 512, CPU).batches
    started = time.perf_counter()
    for batch in tqdm(batches, desc="forward mode"):
        # The step is -rate * gradient / second. With the reference gradient r:
        # influence = <r, -step> = <r * rate / second, gradient>.
        influence[batch.indices] = momentum + derivative(batch).numpy()
    return influence, (time.perf_counter() - started) / len(influence)


def compare(oracle: np.ndarray, influence: np.ndarray, momentum: float, noise: float) -> list[str]:
    """Return Spearman's correlation, sign agreement outside the noise floor for three thresholds, and the rms error."""

    def signs(threshold_oracle: float, threshold_influence: float) -> str:
        outside = np.abs(oracle - threshold_oracle) > noise
        agree = (oracle > threshold_oracle) == (influence > threshold_influence)
        return f"{agree[outside].mean():.3f}" if outside.any() else "none outside"

    return [
        f"{spearmanr(oracle, influence).statistic:.4f}",
        signs(0.0, 0.0),
        signs(momentum, momentum),
        signs(float(np.median(oracle)), float(np.median(influence))),
        f"{np.sqrt(np.mean((oracle - influence) ** 2)):.1e}",
    ]


def changed_weights(setting: Setting, dtype: torch.dtype) -> float:
    """Return the share of weights that one step on the first probing example changes."""
    student = setting.resident(dtype)
    student.take_step(make_batch([(0, setting.probing[0])], CPU))
    changed = sum(int((p != setting.weights[n].to(dtype)).sum()) for n, p in student.parameters.items())
    return changed / sum(p.numel() for p in student.parameters.values())


def double_check(setting: Setting, oracle: np.ndarray, count: int) -> str:
    """Return a sentence about the difference between the oracle and fp64."""
    reference = setting.reference
    meter = InfluenceMeter(setting.resident(torch.float64), reference)
    exact, _ = measure(meter, setting.probing[:count], "fp64")
    return (
        f"In fp64, the influences of the first {count} examples differ from the oracle's by at most "
        f"{np.abs(exact - oracle[:count]).max():.1e}."
    )


if __name__ == "__main__":
    main()
