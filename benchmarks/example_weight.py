"""Measure how well influence predicts training at several example weights, for one student, reference set and probing set.

    python benchmarks/example_weight.py --probing FILE --warmup FILE --reference FILE [--without-layers 12 19]

The program warms a student up, measures the first-order influence of the probing examples at each weight, then trains the
warm student on random subsets and on the examples of highest and lowest influence at each weight. The linear datamodeling
score is Spearman's correlation, over the random subsets, of the summed influence and the decrease of the reference loss.
"linearised" is influence with AdamW linearised too, as forward mode computes it. A batch's loss is the mean over response
tokens, as in the pipeline's training. Fields of the files: instruction, input, output.
"""

import argparse
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine
from scipy.stats import spearmanr
from tqdm import tqdm

from montessori_core.config import DataSource, Warmup
from montessori_core.data.sources import read_tasks
from montessori_core.influence import AdamW, InfluenceMeter, ReferenceSet, ResidentStudent
from montessori_core.influence.adamw import GradientTally
from montessori_core.influence.losses import TokenLosses, example_loss, make_batch
from montessori_core.models.chat import Encoded, encode_example
from montessori_core.models.embedded import fetch_embedded
from montessori_core.models.load import load_model, load_tokenizer
from montessori_core.training.moments import Moments
from montessori_core.training.schedule import rate_factor

CPU = torch.device("cpu")
LINEARISED, TOKENS, NORM = "linearised", "response tokens", "gradient norm"
BATCH_TOKENS = 512
RESAMPLES = 1000


@dataclass(frozen=True)
class WarmStudent:
    """A model after its warm-up, with the state that training continues from.

    Attributes:
        model: the model; training changes its weights.
        weights: weights after the warm-up, by name.
        moments: AdamW moments after the warm-up.
        rate: peak learning rate, used after the warm-up.
        batch_size: batch size of the warm-up and of training.
    """

    model: Any
    weights: dict[str, torch.Tensor]
    moments: Moments
    rate: float
    batch_size: int

    def restore(self) -> None:
        """Restore the weights after the warm-up."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self.weights[name])

    def train(self, examples: Sequence[Encoded]) -> None:
        """Train for one epoch over the examples, in their order, at the peak rate."""
        losses, optimizer = TokenLosses(self.model), new_optimizer(self.model, self.rate)
        for name, parameter in self.model.named_parameters():
            optimizer.state[parameter] = {
                "step": torch.tensor(float(self.moments.step)),
                "exp_avg": self.moments.first[name].clone(),
                "exp_avg_sq": self.moments.second[name].clone(),
            }
        for start in range(0, len(examples), self.batch_size):
            train_step(losses, self.model, optimizer, examples[start : start + self.batch_size])


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    tokenizer = load_tokenizer(str(arguments.student or fetch_embedded()))
    draw = random.Random(arguments.seed)

    def read(path: str, name: str, count: int) -> list[Encoded]:
        tasks = read_tasks(DataSource(path=path), name, with_response=True)
        encoded = [encode_example(tokenizer, task.instruction, task.response, arguments.max_length) for task in tasks]
        usable = [example for example in encoded if example.response_tokens]
        draw.shuffle(usable)
        return usable[:count]

    probing = read(arguments.probing, "probing", arguments.probing_examples)
    reference = ReferenceSet(read(arguments.reference, "reference", arguments.references), BATCH_TOKENS, CPU)
    warmup = read(arguments.warmup, "warmup", arguments.warmup_steps * arguments.batch_size)
    model = load_model(str(arguments.student or fetch_embedded()), torch.float32)
    if arguments.without_layers:
        remove_layers(model, *arguments.without_layers)
    first_loss = reference.evaluate(TokenLosses(model)).reduce("example")
    student = warm_up(model, warmup, arguments)
    influence, note = measure_influence(student, reference, probing, arguments.weights)
    subsets = [draw.sample(range(len(probing)), arguments.subset) for _ in range(arguments.subsets)]
    falls = measure_falls(student, reference, probing, subsets, "random subsets")
    extremes = []
    for weight in arguments.weights:
        order = np.argsort(-influence[f"{weight:g}"]).tolist()
        extremes += [draw.sample(part, len(part)) for part in (order[: arguments.subset], order[-arguments.subset :])]
    extreme_falls = measure_falls(student, reference, probing, extremes, "highest and lowest").reshape(-1, 2)
    if arguments.save:
        np.savez(
            arguments.save, allow_pickle=False, subsets=subsets, falls=falls, extreme_falls=extreme_falls, **influence
        )
    lines = [
        f"### {arguments.title}",
        "",
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters; {len(probing)} probing examples, "
        f"{len(reference)} reference examples, {arguments.max_length} tokens at most; warm-up of "
        f"{student.moments.step} steps of {student.batch_size}, rate {student.rate:g}; {len(subsets)} subsets of "
        f"{arguments.subset}; seed {arguments.seed}. "
        f"Loss of the reference set {first_loss:.4f}, {note} Fall of the loss after a random subset: {falls.mean():.2e}, "
        f"standard deviation {falls.std(ddof=1):.1e}. {describe_machine()}.",
        "",
        *score_table(influence, np.array(subsets), falls, arguments.weights),
        *extremes_table(arguments.weights, extreme_falls, falls),
        *properties_table(influence, arguments.weights),
    ]
    print("\n".join(lines))  # noqa: T201
    if arguments.out:
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--probing", required=True, help="file of probing examples")
    parser.add_argument("--warmup", required=True, help="file of warm-up examples")
    parser.add_argument("--reference", required=True, help="file of reference examples")
    parser.add_argument("--student", type=Path, help="student folder (default: the embedded model)")
    parser.add_argument("--without-layers", type=int, nargs=2, help="first and last layer to remove")
    parser.add_argument("--weights", type=float, nargs="+", default=[1.0, 1 / 8, 1 / 32], help="example weights")
    parser.add_argument("--probing-examples", type=int, default=64, help="number of probing examples")
    parser.add_argument("--references", type=int, default=24, help="number of reference examples")
    parser.add_argument("--warmup-steps", type=int, default=6, help="warm-up steps")
    parser.add_argument("--batch-size", type=int, default=8, help="examples per training step")
    parser.add_argument(
        "--learning-rate", type=float, default=1e-5, help="peak of the warm-up, and rate of the influence step"
    )
    parser.add_argument("--subsets", type=int, default=24, help="number of random subsets to train on")
    parser.add_argument("--subset", type=int, default=16, help="examples per subset")
    parser.add_argument("--max-length", type=int, default=128, help="maximum tokens per example")
    parser.add_argument("--seed", type=int, default=0, help="random seed of examples and subsets")
    parser.add_argument("--title", default="The weight of the example", help="heading of the tables")
    parser.add_argument("--save", type=Path, help=".npz file for subsets, loss decreases and influence")
    parser.add_argument("--out", type=Path, help="Markdown file to append to")
    return parser.parse_args()


def remove_layers(model: Any, first: int, last: int) -> None:
    """Remove layers from a model, in place."""
    layers = model.base_model.layers
    model.base_model.layers = torch.nn.ModuleList([*layers[:first], *layers[last + 1 :]])
    model.config.num_hidden_layers = len(model.base_model.layers)


def new_optimizer(model: Any, rate: float) -> torch.optim.Optimizer:
    """Return the optimizer of warm-up and training, see `PlainAdamW`."""
    recipe = Warmup()
    return torch.optim.AdamW(
        model.parameters(),
        lr=rate,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.epsilon,
        weight_decay=recipe.weight_decay,
        fused=True,
    )


def train_step(losses: TokenLosses, model: Any, optimizer: torch.optim.Optimizer, examples: Sequence[Encoded]) -> None:
    """Take a step on the mean loss over response tokens: bf16 passes on fp32 masters, clipped gradients."""
    with torch.autocast("cpu", torch.bfloat16):
        ReferenceSet(examples, BATCH_TOKENS, CPU).backward(losses, "token", range(len(examples)))
    torch.nn.utils.clip_grad_norm_(model.parameters(), Warmup().max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()


def warm_up(model: Any, examples: Sequence[Encoded], arguments: argparse.Namespace) -> WarmStudent:
    """Train with the warm-up recipe: a linear ramp to the peak rate."""
    losses, optimizer = TokenLosses(model.eval()), new_optimizer(model, arguments.learning_rate)
    size, steps = arguments.batch_size, arguments.warmup_steps
    for step in tqdm(range(steps), desc="warm-up"):
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * rate_factor(step, steps, Warmup().schedule)
        train_step(losses, model, optimizer, [examples[(step * size + n) % len(examples)] for n in range(size)])
    state = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
    first, second = ({n: s[key] for n, s in state.items()} for key in ("exp_avg", "exp_avg_sq"))
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return WarmStudent(model, weights, Moments(first, second, steps), arguments.learning_rate, size)


def measure_influence(
    student: WarmStudent, reference: ReferenceSet, probing: Sequence[Encoded], weights: Sequence[float]
) -> tuple[dict[str, np.ndarray], str]:
    """Measure first-order influence against the null step, from one gradient per example for all weights.

    Returns:
        [probing] influence and dominated share by weight, linearised influence, gradient norm, response tokens; a sentence.
    """
    recipe, moments = Warmup(), student.moments
    adamw = AdamW(student.rate, recipe.beta1, recipe.beta2, recipe.epsilon, recipe.weight_decay, moments.step + 1)
    steps = {f"{weight:g}": replace(adamw, example_weight=weight) for weight in weights}
    resident = ResidentStudent(student.model, moments, adamw, CPU)
    meter = InfluenceMeter(resident, reference, "first_order")
    reference_gradient = meter.reference_gradient
    assert reference_gradient is not None
    (null_projection,) = resident.project_null_step([reference_gradient])
    direction = linear_direction(reference_gradient, moments, adamw)
    coordinates = sum(tensor.numel() for tensor in reference_gradient.values())
    names = [*steps, *(f"dominated {weight}" for weight in steps), LINEARISED, NORM, TOKENS]
    values: dict[str, list[float]] = {name: [] for name in names}
    for example in tqdm(probing, desc="influence"):
        gradient = resident.gradient_of(partial(backward, resident.losses, example))
        for weight, step in steps.items():
            tally = GradientTally()
            projections = [
                step.project([reference_gradient[name]], g, moments.first[name], moments.second[name], CPU, tally)[0]
                for name, g in gradient.items()
            ]
            values[weight].append(null_projection - math.fsum(projections))
            values[f"dominated {weight}"].append(tally.dominated / coordinates)
        products = [float((direction[name] * g).sum(dtype=torch.float64)) for name, g in gradient.items()]
        values[LINEARISED].append(math.fsum(products))
        values[NORM].append(tally.norm)
        values[TOKENS].append(example.response_tokens)
    note = (
        f"{meter.student_loss.reduce('example'):.4f} after the warm-up; the null step's influence is "
        f"{meter.null_step_influence:.2e}, the noise floor {meter.noise_floor:.1e}."
    )
    return {name: np.array(column) for name, column in values.items()}, note


def backward(losses: TokenLosses, example: Encoded) -> None:
    """Run the backward pass of one example."""
    example_loss(losses, make_batch([(0, example)], CPU)).backward()


def measure_falls(
    student: WarmStudent,
    reference: ReferenceSet,
    probing: Sequence[Encoded],
    subsets: Sequence[Sequence[int]],
    description: str,
) -> np.ndarray:
    """Return the [subsets] decrease of the reference loss, nats, after training on each subset of the probing examples."""

    def loss() -> float:
        return reference.evaluate(TokenLosses(student.model)).reduce("example")

    before, falls = loss(), []
    for subset in tqdm(subsets, desc=description):
        student.train([probing[index] for index in subset])
        falls.append(before - loss())
        student.restore()
    return np.array(falls)


def linear_direction(
    reference_gradient: dict[str, torch.Tensor], moments: Moments, adamw: AdamW
) -> dict[str, torch.Tensor]:
    """Return the direction whose dot product with a gradient is the influence at weight 1 with AdamW linearised."""
    scale = adamw.learning_rate * (1 - adamw.beta1) / (1 - adamw.beta1**adamw.step)
    correction = adamw.beta2 / (1 - adamw.beta2**adamw.step)
    return {
        name: tensor * scale / ((moments.second[name] * correction).sqrt() + adamw.epsilon)
        for name, tensor in reference_gradient.items()
    }


def score_table(
    influence: dict[str, np.ndarray], subsets: np.ndarray, falls: np.ndarray, weights: Sequence[float]
) -> list[str]:
    """Return datamodeling scores and differences from the first weight, with 95 % intervals of a paired bootstrap."""
    generator = np.random.default_rng(0)
    samples = generator.integers(len(falls), size=(RESAMPLES, len(falls)))
    names = [*(f"{weight:g}" for weight in weights), LINEARISED, TOKENS, NORM]
    lines = [
        f"| predicted by | datamodeling score | 95 % | difference from weight {weights[0]:g} | 95 % |",
        "|---|---|---|---|---|",
    ]
    first: np.ndarray | None = None
    for name in names:
        sums = influence[name][subsets].sum(1)
        resampled = np.array([spearmanr(sums[rows], falls[rows]).statistic for rows in samples])
        score = spearmanr(sums, falls).statistic
        if first is None:
            first, first_score = resampled, score
        difference = f"{score - first_score:+.3f} | {interval(resampled - first)}"
        lines.append(f"| {name} | {score:.3f} | {interval(resampled)} | {difference} |")
    return [*lines, ""]


def interval(values: np.ndarray) -> str:
    """Return the central 95 % of the values as text."""
    low, high = np.nanquantile(values, [0.025, 0.975])
    return f"{low:.2f} to {high:.2f}"


def extremes_table(weights: Sequence[float], extreme_falls: np.ndarray, falls: np.ndarray) -> list[str]:
    """Return the decrease of the reference loss after training on the highest and lowest examples at each weight."""
    lines = ["| weight | fall, highest | fall, random | fall, lowest |", "|---|---|---|---|"]
    for weight, (highest, lowest) in zip(weights, extreme_falls, strict=True):
        lines.append(f"| {weight:g} | {highest:.2e} | {falls.mean():.2e} | {lowest:.2e} |")
    return [*lines, ""]


def properties_table(influence: dict[str, np.ndarray], weights: Sequence[float]) -> list[str]:
    """Return properties of influence at each weight: signs, dominated share, Spearman's correlations."""
    others = [*(f"{weight:g}" for weight in weights), LINEARISED, TOKENS, NORM]
    lines = [
        "| weight | above the null step | dominated share, median | mean | sd | "
        + " | ".join(f"Spearman, {name}" for name in others)
        + " | sign, linearised |",
        "|" + "---|" * (len(others) + 6),
    ]
    for weight in weights:
        values = influence[f"{weight:g}"]
        correlations = [f"{spearmanr(values, influence[name]).statistic:.3f}" for name in others]
        cells = [f"{weight:g}", f"{(values > 0).mean():.0%}", f"{np.median(influence[f'dominated {weight:g}']):.1%}"]
        cells += [f"{values.mean():.1e}", f"{values.std(ddof=1):.1e}", *correlations]
        cells += [f"{((values > 0) == (influence[LINEARISED] > 0)).mean():.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


if __name__ == "__main__":
    main()
