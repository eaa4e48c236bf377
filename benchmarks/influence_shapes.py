"""Measure influence for students of real sizes, with random weights: seconds and memory beside what the hardware allows.

    python benchmarks/influence_shapes.py [--shapes 135m 1b 8b] [--estimators linear first_order exact] [--dtypes bfloat16]

The cost does not depend on the values of weights, moments and tokens. *Floor* is the larger of two times: the operations of
the procedure at the speed of a large matrix product, and its reads of weights and directions or moments at the speed of a
large copy, both measured in the same run. Each line is printed as soon as it is known.
"""

import argparse
import gc
from dataclasses import dataclass
from typing import Any

import torch
from influence import matmul_peak, random_example, timed
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from montessori_core.influence import AdamW, InfluenceMeter, ReferenceSet, ResidentStudent
from montessori_core.influence.linear import LinearMeter
from montessori_core.influence.memory import plan_memory
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


@dataclass(frozen=True)
class Speed:
    """Speed of the device: FLOP/s of a large matrix product, bytes per second of a large copy (read and written)."""

    flops: float
    bytes: float

    @staticmethod
    def of(device: torch.device, dtype: torch.dtype) -> "Speed":
        """Measure both."""
        source = torch.empty(1 << (28 if device.type == "cuda" else 22), device=device)
        copy = min(timed(source.clone, device) for _ in range(5))
        return Speed(matmul_peak(device, dtype), 2 * 4 * source.numel() / copy)


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(_LLAMA), default=["135m", "1b", "8b"])
    parser.add_argument("--estimators", nargs="+", default=["linear", "first_order", "exact"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "mixed", "bfloat16"])
    parser.add_argument("--references", type=int, default=256, help="reference examples, of 135 tokens")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of an example")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    speeds = {dtype: Speed.of(device, dtype) for dtype in map(number, arguments.dtypes)}
    for dtype, speed in speeds.items():
        say(f"{dtype}: {speed.flops / 1e12:.2f} TFLOP/s, {speed.bytes / 1e9:.0f} GB/s")
    say(
        "\n| student | numbers | estimator | opening, s | s an example | floor, s | peak memory, GB |\n"
        "|---|---|---|---|---|---|---|"
    )
    for name in arguments.shapes:
        for dtype in arguments.dtypes:
            for estimator in arguments.estimators:
                try:
                    cells = measure(name, dtype, estimator, arguments, device, speeds[number(dtype)])
                except torch.OutOfMemoryError:
                    cells = ["out of memory", "", "", ""]
                say(f"| {name} | {dtype} | {estimator} | {' | '.join(cells)} |")
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()


def number(dtype: str) -> torch.dtype:
    """Return the type of the numbers that a setting `dtype` multiplies: of "mixed", bfloat16."""
    return torch.float32 if dtype == "float32" else torch.bfloat16


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)  # noqa: T201


def measure(
    name: str, dtype: str, estimator: Any, arguments: argparse.Namespace, device: torch.device, speed: Speed
) -> list[str]:
    """Return seconds to open, seconds per example, the floor and the peak memory."""
    model = random_model(name, torch.bfloat16 if dtype == "bfloat16" else torch.float32, device)
    shape = Shape.of(model)
    reference = ReferenceSet([random_example(135) for _ in range(arguments.references)], _BATCH_TOKENS, device)
    memory = torch.cuda.mem_get_info()[1] if device.type == "cuda" else 10**15
    plan = plan_memory(shape, estimator, dtype, arguments.tokens, _BATCH_TOKENS, memory)  # type: ignore[arg-type]

    def open_student() -> ResidentStudent:
        adamw = AdamW(5e-6, 0.9, 0.999, 1e-8, 0.0, 31, 1 / 32)
        return ResidentStudent(model, random_moments(model), adamw, device, dtype == "mixed", plan.placement)

    meter: Any

    def open_meter() -> None:
        nonlocal meter
        if estimator == "linear":
            meter = LinearMeter(model, open_student, reference, mixed=dtype == "mixed", batch_tokens=_BATCH_TOKENS)
        else:
            meter = InfluenceMeter(open_student(), reference, estimator)

    opening = timed(open_meter, device)
    count = {"linear": _BATCH_TOKENS // arguments.tokens, "exact": 1}.get(estimator, 4)
    examples = [random_example(arguments.tokens) for _ in range(count)]

    def run() -> None:
        if estimator == "exact":
            meter.measure(examples[0])
        else:
            meter.measure_batch(examples)

    run()
    seconds = min(timed(run, device) for _ in range(2)) / len(examples)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    floor = floor_seconds(shape, estimator, arguments, len(examples), model.dtype.itemsize, speed)
    return [f"{opening:.1f}", f"{seconds:.3f}", f"{floor:.3f}", f"{peak:.1f}"]


def floor_seconds(
    shape: Shape, estimator: str, arguments: argparse.Namespace, together: int, width: int, speed: Speed
) -> float:
    """Return the seconds that operations or reads take at least, for an example.

    Linear: a forward and a backward pass and two directions; first order: the weight gradient, and two directions and moments
    read; exact: both passes and the weight gradient, and a forward pass over the reference set.
    """
    passes, reads = {"linear": (8, 3 / together), "first_order": (6, 5 / together), "exact": (6, 6)}[estimator]
    flops = passes * shape.parameters * arguments.tokens
    if estimator == "exact":
        flops += 2 * shape.parameters * 135 * arguments.references
    return float(max(flops / speed.flops, reads * width * shape.parameters / speed.bytes))


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
        dtype=dtype,
    )
    with torch.device(device), no_init_weights():
        model = LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    return model


def random_moments(model: Any) -> Moments:
    """Return random moments of realistic size, in the dtype and on the device of the weights."""
    first = {name: torch.randn_like(p).mul_(1e-4) for name, p in model.named_parameters()}
    return Moments(first, {name: moment.square().add_(1e-12) for name, moment in first.items()}, 30)


if __name__ == "__main__":
    main()
