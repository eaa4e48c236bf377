"""Compare the cost of measuring influence: the published procedure and ours, in one run.

    python benchmarks/influence.py [--references 256] [--scaling]
    python benchmarks/influence.py --batches [--student DIR]

*Naive* is the procedure of the authors' public code. For each example it loads the checkpoint and the optimizer state from
disk, pads everything to 1024 tokens, and computes logits at every position. All procedures use the same student (the embedded
SmolLM2-135M), moments, probing examples, reference examples and threads. Reference examples are built-in ones, repeated as
needed: only their lengths matter. --scaling adds the cost for several reference sizes, lengths and model sizes. All run on
the GPU, if there is one, in the deterministic mode of jobs. There, times are taken after synchronisation, and the peak memory
of ours is printed.

--batches instead compares first order in batches of short examples with first order one by one, in which autograd computes
each gradient, and AdamW's state is read for each example; then the opening of a first and a second worker.
"""

import argparse
import gc
import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from machine import matmul_peak, now, timed
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from montessori_core.config import DataSource
from montessori_core.data.sources import read_tasks
from montessori_core.influence import AdamW, InfluenceMeter, ReferenceSet, ResidentStudent
from montessori_core.influence.adamw import GradientTally
from montessori_core.influence.losses import Batch, example_loss, make_batch
from montessori_core.influence.memory import plan_memory
from montessori_core.influence.projections import AlongDirections, Direction
from montessori_core.models.chat import IGNORED, Encoded, encode_example
from montessori_core.models.device import compute_device
from montessori_core.models.embedded import fetch_embedded
from montessori_core.models.load import load_model, load_tokenizer
from montessori_core.models.shape import Shape
from montessori_core.training.moments import Moments, load_moments, save_moments

PADDED = 1024
RATE = 5e-6


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=int, default=256, help="number of reference examples")
    parser.add_argument("--batch-tokens", type=int, default=1024, help="tokens per batch of reference examples")
    parser.add_argument(
        "--naive-batch", type=int, default=4, help="reference examples per batch of the naive procedure"
    )
    parser.add_argument(
        "--screened-share",
        type=float,
        default=0.06,
        help="share of examples that the screened estimator measures exactly",
    )
    parser.add_argument("--student", type=Path, help="model folder (default: the embedded model)")
    parser.add_argument("--skip-naive", action="store_true", help="omit the naive procedure")
    parser.add_argument(
        "--dtype", choices=["float32", "mixed", "bfloat16"], default="float32", help="precision of ours"
    )
    parser.add_argument("--batches", action="store_true", help="compare first order in batches and one by one")
    parser.add_argument("--scaling", action="store_true", help="also measure how the cost scales")
    arguments = parser.parse_args()
    device = compute_device()
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # saving a model imports deepspeed, which warns otherwise
    student = arguments.student or fetch_embedded()
    tokenizer = load_tokenizer(str(student))
    references, probing = (
        [encode_example(tokenizer, task.instruction, task.response, PADDED) for task in read_tasks(source, name, True)]
        for source, name in ((DataSource(path="builtin"), "reference"), (DataSource(path="builtin"), "evaluation"))
    )
    if arguments.batches:
        compare_batches(student, references[:8], device)
        return
    references = [references[i % len(references)] for i in range(arguments.references)]
    mean = sum(len(e.input_ids) for e in references) / len(references)
    peak = matmul_peak(device, weights_type(arguments.dtype))
    print(  # noqa: T201
        f"{arguments.references} reference examples of {mean:.0f} tokens on average; {torch.get_num_threads()} threads, "
        f"{device}; a large matrix product reaches {peak / 1e9:.0f} GFLOP/s"
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = prepare(Path(scratch), student)
        rows: list[tuple[str, float]] = []
        if not arguments.skip_naive:
            rows.append(("naive", measure_naive(folder, probing[0], references, arguments.naive_batch, device)))
        if device.type == "cuda":
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
        seconds_exact, mfu = measure_ours(folder, "exact", references, probing[:2], arguments, device, peak)
        rows.append(("exact", seconds_exact))
        seconds_first, _ = measure_ours(folder, "first_order", references, probing[:8], arguments, device, peak)
        rows.append(("first order", seconds_first))
        rows.append(
            (
                f"screened, {arguments.screened_share:.0%} exact",
                seconds_first + arguments.screened_share * seconds_exact,
            )
        )
        print("\n| procedure | s / example | speed-up |\n|---|---|---|")  # noqa: T201
        for name, seconds in rows:
            ratio = f"{rows[0][1] / seconds:.0f}" if not arguments.skip_naive else "not measured"
            print(f"| {name} | {seconds:.2f} | {ratio} |")  # noqa: T201
        print(f"\nreference pass: {mfu:.0%} of the peak of a large matrix product")  # noqa: T201
    if device.type == "cuda":
        print(f"peak memory of ours on the GPU: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")  # noqa: T201
    if arguments.scaling:
        scaling(device)


def weights_type(dtype: str) -> torch.dtype:
    """Return the type of the weights, which the reference pass has too, for a setting `dtype`."""
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


def prepare(folder: Path, student: Path) -> Path:
    """Save a warm student, weights and moments, to a folder."""
    model = load_model(str(student), torch.float32)
    model.save_pretrained(folder)
    save_moments(random_moments(model), folder)
    return folder


def random_moments(model: Any) -> Moments:
    """Return random moments of realistic size: the cost of a step does not depend on their values."""
    generator = torch.Generator().manual_seed(0)
    first, second = {}, {}
    for name, parameter in model.named_parameters():
        first[name] = (torch.randn(parameter.shape, generator=generator) * 1e-4).to(parameter.device)
        second[name] = first[name].square() + 1e-12
    return Moments(first, second, 30)


def measure_naive(folder: Path, example: Encoded, references: list[Encoded], batch: int, device: torch.device) -> float:
    """Return the seconds of the naive procedure for one example."""

    def padded(examples: list[Encoded]) -> dict[str, torch.Tensor]:
        ids = torch.zeros((len(examples), PADDED), dtype=torch.long)
        labels = torch.full((len(examples), PADDED), IGNORED)
        mask = torch.zeros((len(examples), PADDED), dtype=torch.long)
        for row, item in enumerate(examples):
            length = len(item.input_ids)
            ids[row, :length], labels[row, :length] = torch.tensor(item.input_ids), torch.tensor(item.labels)
            mask[row, :length] = 1
        return {"input_ids": ids.to(device), "labels": labels.to(device), "attention_mask": mask.to(device)}

    def measure() -> None:
        starts = {}
        starts["load"] = now(device)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
        moments = load_moments(folder)
        for name, parameter in model.named_parameters():
            optimizer.state[parameter] = {
                "step": torch.tensor(float(moments.step)),
                "exp_avg": moments.first[name].to(device),
                "exp_avg_sq": moments.second[name].to(device),
            }
        starts["step"] = now(device)
        model(**padded([example])).loss.backward()
        optimizer.step()
        starts["evaluate"] = now(device)
        with torch.no_grad():
            for start in range(0, len(references), batch):
                model(**padded(references[start : start + batch]))
        starts["end"] = now(device)
        names = list(starts)
        seconds = ", ".join(f"{a} {starts[b] - starts[a]:.2f} s" for a, b in itertools.pairwise(names))
        print(f"naive: {seconds}")  # noqa: T201

    return timed(measure, device)


def measure_ours(
    folder: Path,
    estimator: Literal["exact", "first_order"],
    references: list[Encoded],
    probing: list[Encoded],
    arguments: argparse.Namespace,
    device: torch.device,
    peak: float,
) -> tuple[float, float]:
    """Return the seconds per example, and the share of the peak FLOP/s that the reference pass reaches."""
    model = load_model(str(folder), weights_type(arguments.dtype))
    moments = load_moments(folder)
    reference = ReferenceSet(references, arguments.batch_tokens, device)
    memory = torch.cuda.mem_get_info()[1] if device.type == "cuda" else 10**15
    plan = plan_memory(Shape.of(model), estimator, (arguments.dtype, "float32"), PADDED, arguments.batch_tokens, memory)
    adamw = AdamW(RATE, 0.9, 0.999, 1e-8, 0.0, moments.step + 1)
    mixed = arguments.dtype == "mixed"
    student = ResidentStudent(model.to(device), moments, adamw, device, mixed, plan.placement)
    started = now(device)
    meter = InfluenceMeter(student, reference, estimator)
    print(f"{estimator}: opened in {now(device) - started:.1f} s, once per worker")  # noqa: T201
    meter.measure(probing[0])
    seconds = timed(lambda: [meter.measure(example) for example in probing], device) / len(probing)
    reference_pass = timed(lambda: reference.evaluate(student.losses), device)
    return seconds, forward_flops(model, references) / reference_pass / peak


def forward_flops(model: Any, examples: list[Encoded]) -> float:
    """Return the FLOPs of a pass with logits at labelled positions: two per weight and token, plus causal attention."""
    shape, head = Shape.of(model), model.get_output_embeddings().weight.numel()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    body = shape.parameters - (head if tied else 2 * head)
    total = 0.0
    for example in examples:
        length = len(example.input_ids)
        total += 2 * body * length + 2 * head * example.response_tokens + 2 * shape.layers * shape.hidden * length**2
    return total


class OneByOne:
    """First order as it was before batches: the reference for speed and agreement."""

    def __init__(
        self, student: ResidentStudent, moments: Moments, adamw: AdamW, directions: Sequence[Direction]
    ) -> None:
        self._student, self._moments, self._adamw, self._directions = student, moments, adamw, directions

    def project(self, example: Encoded) -> float:
        """Return <direction, step> of the first direction."""
        tally = GradientTally()
        totals = torch.zeros(len(self._directions), dtype=torch.float64, device=self._student.device)

        def add(name: str, parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            state = parameter.grad, self._moments.first[name], self._moments.second[name]
            chunks = (tensor.view(-1).split(1 << 16) for tensor in (*state, *(d[name] for d in self._directions)))
            for gradient, first, second, main, half in zip(*chunks, strict=True):
                step = torch.zeros_like(gradient)
                self._adamw.step_(step, gradient, first, second, tally)
                in_fp64 = (step * main).sum(dtype=torch.float64)
                totals.add_(torch.stack([in_fp64, torch.dot(step, half.to(step.dtype)).double()]))
            parameter.grad = None

        parameters = self._student.parameters.items()
        hooks = [p.register_post_accumulate_grad_hook(torch.no_grad()(partial(add, name))) for name, p in parameters]
        example_loss(self._student.losses, make_batch([(0, example)], self._student.device)).backward()
        for hook in hooks:
            hook.remove()
        assert math.isfinite(tally.norm)
        return float(totals[0])


def compare_batches(folder: Path, references: list[Encoded], device: torch.device) -> None:
    """Print seconds per example of first order one by one and in batches, and seconds to open a worker."""
    model = load_model(str(folder), torch.float32).to(device)
    moments = random_moments(model)
    adamw = AdamW(RATE, 0.9, 0.999, 1e-8, 0.0, moments.step + 1, 1 / 32)

    def opened(shared: Path) -> tuple[ResidentStudent, InfluenceMeter]:
        student = ResidentStudent(model, moments, adamw, device)
        return student, InfluenceMeter(student, ReferenceSet(references, 1024, device), "first_order", shared=shared)

    with tempfile.TemporaryDirectory() as scratch:
        first, second = (timed(partial(opened, Path(scratch)), device) for _ in range(2))
        student, meter = opened(Path(scratch))
    print(f"opening with {len(references)} reference examples: {first:.1f} s, second worker {second:.1f} s")  # noqa: T201
    assert meter.reference_gradient is not None
    directions = [meter.reference_gradient.full, meter.reference_gradient.half]
    single = OneByOne(student, moments, adamw, directions)
    print("\n| tokens | one by one, s | batches of 1 | batches of 8 | 4 targets | GFLOP/s | Spearman | signs |")  # noqa: T201
    print("|---|---|---|---|---|---|---|---|")  # noqa: T201
    for length in (64, 96, 128):
        examples = [random_example(length) for _ in range(8)]
        batches = [make_batch([(0, example)], device) for example in examples]
        results: dict[str, list[float]] = {}

        def project(name: str, size: int, targets: int, batches: list[Batch] = batches) -> None:
            groups = [batches[start : start + size] for start in range(0, 8, size)]
            along = AlongDirections(directions * targets)
            steps = [step for group in groups for step in student.project_steps(group, along)]
            results[name] = [float(projections[0]) for _, projections in steps]  # noqa: B023 - called in this iteration

        def project_singly(examples: list[Encoded] = examples) -> None:
            results["one by one"] = list(map(single.project, examples))  # noqa: B023

        procedures: list[Callable[[], None]] = [
            project_singly,
            partial(project, "batches of 1", 1, 1),
            partial(project, "batches of 8", 8, 1),
            partial(project, "4 targets", 8, 4),
        ]
        # Procedures take turns, so that other work on the machine disturbs all of them.
        times = [[processor_seconds(procedure, device) / 8 for procedure in procedures] for _ in range(2)]
        best = [min(column) for column in zip(*times, strict=True)]
        null = meter.reference_gradient.null_projections[0]
        one, batched = ([null - value for value in results[name]] for name in ("one by one", "batches of 8"))
        signs = sum((a > 0) == (b > 0) for a, b in zip(one, batched, strict=True))
        seconds = f"{best[0]:.2f} | " + " | ".join(f"{s:.2f} ({best[0] / s:.2f}x)" for s in best[1:])
        peak = matmul_peak(device, torch.float32) / 1e9
        agreement = f"{spearmanr(one, batched).statistic:.4f} | {signs} of 8"
        print(f"| {length} | {seconds} | {peak:.0f} | {agreement} |", flush=True)  # noqa: T201


def processor_seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Return the processor's seconds of one call, which other processes disturb less; on a GPU, elapsed seconds."""
    if device.type == "cuda":
        return timed(function, device)
    started = time.process_time()
    function()
    return time.process_time() - started


def random_example(length: int) -> Encoded:
    """Return an example of random tokens; half of them are the response."""
    ids = torch.randint(3, 1000, (length,)).tolist()
    return Encoded(ids, [IGNORED] * (length // 2) + ids[length // 2 :], False)


def scaling(device: torch.device) -> None:
    """Print the cost for several reference sizes, example lengths and model sizes, on models with random weights."""

    print("\n| student | reference examples | tokens per example | exact, s | first order, s |\n|---|---|---|---|---|")  # noqa: T201
    small, medium, large = (256, 768, 8), (576, 1536, 15), (576, 1536, 30)
    for sizes, count, length in (
        (small, 32, 128),
        (small, 32, 256),
        (small, 32, 512),
        (medium, 32, 128),
        (large, 32, 128),
        (large, 16, 128),
    ):
        hidden, intermediate, layers = sizes
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
            vocab_size=49152,
            tie_word_embeddings=True,
        )
        model = LlamaForCausalLM(config).to(device)
        seconds = []
        for estimator, repeats in (("exact", 1), ("first_order", 3)):
            reference = ReferenceSet([random_example(length) for _ in range(count)], 1024, device)
            student = ResidentStudent(model, random_moments(model), AdamW(RATE, 0.9, 0.999, 1e-8, 0.0, 31), device)
            meter = InfluenceMeter(student, reference, estimator)  # type: ignore[arg-type]
            probes = [random_example(length)] * repeats
            total = timed(partial(list, map(meter.measure, probes)), device)
            seconds.append(total / repeats)
        size = Shape.of(model).parameters / 1e6
        print(f"| {size:.0f}M | {count} | {length} | {seconds[0]:.2f} | {seconds[1]:.2f} |", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
