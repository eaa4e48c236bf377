"""Measure influence for students of real sizes, with random weights: seconds and memory beside what the hardware allows.

    python benchmarks/influence_shapes.py [--shapes 135m 1b 8b] [--estimators linear first_order exact] [--dtypes bfloat16]

The cost does not depend on the values of weights, moments and tokens. *Floor* is the larger of two times: the operations of
the procedure at the speed of large matrix products, and its reads of weights and directions or moments at the speed of a
large copy, all measured in the same run. It runs on the GPU, if there is one, in the deterministic mode of jobs. Each line is
printed as soon as it is known.
"""

import argparse
import gc
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

import torch
from influence import random_example, weights_type
from machine import Speed, timed
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.initialization import no_init_weights

from montessori_core.errors import UserError
from montessori_core.influence import AdamW, InfluenceMeter, ReferenceSet, ResidentStudent
from montessori_core.influence.host_memory import host_memory_limit
from montessori_core.influence.linear import LinearMeter
from montessori_core.influence.memory import plan_memory
from montessori_core.models.device import compute_device
from montessori_core.models.shape import Shape
from montessori_core.training.moments import Moments

_LLAMA = {
    "tiny": (64, 128, 2, 4, 2, 1000),
    "135m": (576, 1536, 30, 9, 3, 49152),
    "1b": (2048, 5632, 22, 32, 4, 32000),
    "8b": (4096, 14336, 32, 32, 8, 128256),
}
"""Hidden and intermediate size, layers, heads, heads of keys, vocabulary."""
_BATCH_TOKENS = 2048
_ESTIMATORS = ["linear", "first_order", "exact"]


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(_LLAMA), default=["135m", "1b", "8b"])
    parser.add_argument("--estimators", nargs="+", choices=_ESTIMATORS, default=_ESTIMATORS)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "mixed", "bfloat16"])
    parser.add_argument("--states", nargs="+", default=["float32"], help="what moments and gradients are kept in")
    parser.add_argument("--references", type=int, default=256, help="reference examples, of 135 tokens")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of an example")
    arguments = parser.parse_args()
    device = compute_device()
    used = {used for dtype in arguments.dtypes for used in (weights_type(dtype), multiplied_type(dtype))}
    speeds = {dtype: Speed.of(device, dtype) for dtype in sorted(used, key=str)}
    for dtype, speed in speeds.items():
        say(f"{dtype}: {speed.flops / 1e12:.2f} TFLOP/s, {speed.bytes / 1e9:.0f} GB/s")
    say(
        "\n| student | numbers | state | estimator | opening, s | s an example | floor, s | peak memory, GB |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for name in arguments.shapes:
        for dtype, state_dtype in product(arguments.dtypes, arguments.states):
            for estimator in arguments.estimators:
                try:
                    cells = measure(name, (dtype, state_dtype), estimator, arguments, device, speeds)
                except torch.OutOfMemoryError:
                    cells = ["out of memory", "", "", ""]
                except UserError as error:  # as in a job, the plan does not fit
                    cells = [str(error).partition(" (")[0], "", "", ""]
                say(f"| {name} | {dtype} | {state_dtype} | {estimator} | {' | '.join(cells)} |")
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()


def multiplied_type(dtype: str) -> torch.dtype:
    """Return the type of the numbers that an example's passes multiply: of "mixed", bfloat16."""
    return torch.float32 if dtype == "float32" else torch.bfloat16


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)  # noqa: T201


def measure(
    name: str,
    dtypes: Any,
    estimator: Any,
    arguments: argparse.Namespace,
    device: torch.device,
    speeds: Mapping[torch.dtype, Speed],
) -> list[str]:
    """Return seconds to open, seconds per example, the floor and the peak memory.

    Raises:
        UserError: the device or the host has too little memory for the plan.
        torch.OutOfMemoryError: the device has too little memory.
    """
    dtype, state = dtypes
    count = {"linear": max(1, _BATCH_TOKENS // arguments.tokens), "exact": 1}.get(estimator, 4)
    model = random_model(name, weights_type(dtype), device)
    shape = Shape.of(model)
    reference = ReferenceSet([random_example(135) for _ in range(arguments.references)], _BATCH_TOKENS, device)
    # A job of first order measures as many tokens together as its longest example may have.
    longest = arguments.tokens * (count if estimator == "first_order" else 1)
    memory = torch.cuda.mem_get_info()[1] if device.type == "cuda" else 10**15
    plan = plan_memory(shape, estimator, dtypes, longest, _BATCH_TOKENS, memory)
    plan.check(host_memory_limit())

    mixed = dtype == "mixed"
    state_dtype = torch.bfloat16 if state == "bfloat16" and dtype != "bfloat16" else None

    def open_student() -> ResidentStudent:
        adamw = AdamW(5e-6, 0.9, 0.999, 1e-8, 0.0, 31, 1 / 32)
        kept = None if estimator == "linear" else state_dtype
        return ResidentStudent(model, random_moments(model), adamw, device, mixed, plan.placement, None, kept)

    meter: Any

    def open_meter() -> None:
        nonlocal meter
        if estimator == "linear":
            meter = LinearMeter(model, open_student, reference, mixed=mixed, state_dtype=state_dtype)
        else:
            meter = InfluenceMeter(open_student(), reference, estimator)

    opening = timed(open_meter, device)
    examples = [random_example(arguments.tokens) for _ in range(count)]

    def run() -> None:
        if estimator == "exact":
            meter.measure(examples[0])
        else:
            meter.measure_batch(examples)

    run()
    seconds = min(timed(run, device) for _ in range(2)) / len(examples)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    speed, reference_speed = speeds[multiplied_type(dtype)], speeds[weights_type(dtype)]
    passes_width = 2 if mixed and estimator != "exact" else model.dtype.itemsize
    widths = passes_width, 2 if state_dtype or (mixed and estimator == "linear") else model.dtype.itemsize
    floor = floor_seconds(shape, estimator, arguments, len(examples), widths, speed, reference_speed)
    return [f"{opening:.1f}", f"{seconds:.3f}", f"{floor:.3f}", f"{peak:.1f}"]


def floor_seconds(
    shape: Shape,
    estimator: str,
    arguments: argparse.Namespace,
    together: int,
    widths: tuple[int, int],
    speed: Speed,
    reference_speed: Speed,
) -> float:
    """Return the seconds that operations or reads take at least, for an example.

    Linear: a forward and a backward pass and two directions; first order: the weight gradient, and two directions and moments
    read; exact: both passes and the weight gradient, and a forward pass over the reference set.

    Args:
        shape: shape of the student.
        estimator: which of these.
        arguments: numbers of tokens and reference examples.
        together: examples that are measured together.
        widths: bytes of a weight in the passes over an example, and of a number of directions or moments.
        speed: of the passes over the example.
        reference_speed: of passes over the reference set, which compute in the type of the weights.
    """
    passes, weights, state = {
        "linear": (8, 1 / together, 2 / together),
        "first_order": (6, 1 / together, 4 / together),
        "exact": (6, 4, 2),
    }[estimator]
    seconds = passes * shape.parameters * arguments.tokens / speed.flops
    if estimator == "exact":
        seconds += 2 * shape.parameters * 135 * arguments.references / reference_speed.flops
    read = (weights * widths[0] + state * widths[1]) * shape.parameters
    return float(max(seconds, read / speed.bytes))


def random_model(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a model of a shape, with random weights."""
    hidden, intermediate, layers, heads, keys, vocabulary = _LLAMA[name]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        vocab_size=vocabulary,
        tie_word_embeddings=name == "135m",
    )
    with torch.device(device), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # the constructor would make it in fp32 first
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    return model


class RandomTensors(Mapping[str, torch.Tensor]):
    """Random tensors in the shapes of a model's parameters, each made when it is read.

    The student puts each into its home before it reads the next: the device never has all of them.
    """

    def __init__(self, model: Any, adjust: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """`adjust` makes values of realistic size from normal ones, in the dtype and on the device of the weights."""
        self._parameters, self._adjust = dict(model.named_parameters()), adjust

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._adjust(torch.randn_like(self._parameters[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


def random_moments(model: Any) -> Moments:
    """Return random moments of realistic size."""
    first = RandomTensors(model, lambda normal: normal.mul_(1e-4))
    return Moments(first, RandomTensors(model, lambda normal: normal.square_().mul_(1e-8).add_(1e-12)), 30)


if __name__ == "__main__":
    main()
