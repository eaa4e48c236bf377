"""Estimate the stages of a run and their time on this machine, before the first job.

A stage takes _JOB_SECONDS per job and, for each kind of work, FLOPs / (GFLOP/s of a matrix product on this machine x the
share that the kind reaches). FLOPs are two per weight and token forward, six forward and backward (`flops`). Numbers of
tokens are typical values, from the texts of the sets and the limits of the configuration. Not included: further rounds of
synthesis, which depend on the filters, jobs of filters, benchmarks, and the time of answers behind an API.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from montessori_core.config import Experiment, GroundedStrategy, Influence, Lora, Synthesis, Training, Warmup
from montessori_core.data.sources import Sources, Task
from montessori_core.formatting import duration
from montessori_core.models.flops import BACKWARD, FORWARD, FROZEN_BACKWARD, weights_of
from montessori_core.provenance import record_speed
from montessori_core.speed import measure_gflops
from tasks.run import Run

_JOB_SECONDS = 3.0
"""Loading a model, saving results, and the gap between two jobs; jobs are forked from a warm process."""
_EFFICIENCY = {"prompt": 0.8, "write": 0.45, "read": 0.7, "learn": 0.55}
"""Share of the GFLOP/s of an fp32 matrix product: the teacher reads prompts and writes token by token, the student reads
and learns. Measured on the stages of a quickstart on one core, all in fp32 (docs/benchmarks.md)."""
_CHARACTERS_PER_TOKEN = 4.0
_TOKENS_PER_WORD = 1.4
_FRAME = {"chat": 220, "completion": 60}  # tokens of a prompt without its demonstrations
_TAGS = 10  # tokens around a demonstration, or around a turn of a chat
_RESPONSE_SHARE = 0.8  # mean length of responses, as a share of the token limit
_LONGEST_RESPONSE = 250  # tokens, for any higher limit
_PAIRS_PER_EXAMPLE = 0.7  # pairs per probing example; 6,792 from 10,000 in the paper
_CONFIRMED = 0.06  # share of the unaudited examples that the screened estimator measures exactly
_CHECKS = 3  # evaluations of the reference set before the first example is measured


@dataclass(frozen=True)
class PlannedStage:
    """A stage, or a few stages that belong together.

    Attributes:
        name: label of its progress bar.
        work: description of its output, e.g. "100 examples".
        jobs: number of jobs that run one after the other.
        flops: floating-point operations by kind of work, see `_EFFICIENCY`.
        answers: number of answers from an API, whose time is not estimated.
    """

    name: str
    work: str
    jobs: int
    flops: dict[str, float]
    answers: int = 0

    def seconds(self, gflops: float) -> float:
        """Estimate the seconds of the stage from the GFLOP/s of a matrix product."""
        work = sum(count / (gflops * 1e9 * _EFFICIENCY[kind]) for kind, count in self.flops.items())
        return self.jobs * _JOB_SECONDS + work


@dataclass(frozen=True)
class Estimate:
    """Estimate of a run.

    Attributes:
        stages: its stages, in approximate order.
        gflops: GFLOP/s that a job reaches on this machine; None if the jobs do not run on this machine's CPU.
        dollars: price of the answers from `answerer`, without its cache; 0 without prices.
    """

    stages: list[PlannedStage]
    gflops: float | None
    dollars: float = 0.0

    @property
    def seconds(self) -> float | None:
        """Estimated seconds of the run; None if the speed is not known."""
        return sum(stage.seconds(self.gflops) for stage in self.stages) if self.gflops else None

    @property
    def answers(self) -> int:
        """Number of answers from an API."""
        return sum(stage.answers for stage in self.stages)

    def table(self) -> list[tuple[str, ...]]:
        """Return a header, and a row for each stage: its name, its work and, if the speed is known, its time."""
        gflops = self.gflops
        if not gflops:
            return [("stage", "work"), *((stage.name, stage.work) for stage in self.stages)]
        times = [(stage.name, stage.work, duration(stage.seconds(gflops))) for stage in self.stages]
        return [("stage", "work", "about"), *times]

    def left_out(self, experiment: Experiment) -> list[str]:
        """Return a sentence for each part of the run whose time is not estimated."""
        sentences = []
        if experiment.benchmarks.tasks or experiment.benchmarks.judged:
            sentences.append("benchmarks of the students are not included")
        if experiment.answerer is not None:
            price = f", about {self.dollars:,.2f} dollars" if self.dollars else ""
            sentences.append(
                f"the time of {self.answers:,} answers from {experiment.answerer.model} is not included{price}"
            )
        return sentences


def estimate_run(run: Run) -> Estimate:
    """Estimate the stages of a run; if its jobs use this machine's CPU, measure and record the CPU's speed."""
    teacher, student = run.initial_teacher(), run.initial_student()
    sizes = Sizes.of(run.experiment, run.sources(), weights_of(Path(teacher.path)), weights_of(Path(student.path)))
    gflops = _measure_speed(run.experiment)
    if gflops:
        record_speed(run.folder, gflops)
    stages = list(planned_stages(run.experiment, sizes))
    return Estimate(stages, gflops, _price(run.experiment, sizes) * sum(stage.answers for stage in stages))


def _price(experiment: Experiment, sizes: "Sizes") -> float:
    """Estimate the price of an answer from the endpoint `answerer`, dollars."""
    answerer = experiment.answerer
    if answerer is None:
        return 0.0
    written = min(sizes.response, answerer.max_tokens) * answerer.dollars_per_million_output_tokens
    return (sizes.instruction * answerer.dollars_per_million_input_tokens + written) / 1e6


def _measure_speed(experiment: Experiment) -> float | None:
    """Measure the GFLOP/s that a job reaches; None if the jobs do not run on this machine's CPU."""
    stages = dict(experiment.cluster.resources).values()
    if experiment.cluster.profile != "local" or any(resources.gpus_per_node for resources in stages):
        return None
    return measure_gflops(experiment.cluster.resources.training.cpus_per_process)


@dataclass(frozen=True)
class Sizes:
    """Typical numbers of tokens of an experiment's texts, and the sizes of its models (see `flops`).

    Attributes:
        teacher, student: number of weights.
        prompt, instruction, response: mean tokens of a text that the teacher reads or writes.
        example: mean tokens of an example in the student's format.
        reference, evaluation: number of examples of these sets.
        reference_tokens, evaluation_tokens: total tokens of these sets.
    """

    teacher: int
    student: int
    prompt: float
    instruction: float
    response: float
    example: float
    reference: int
    evaluation: int
    reference_tokens: float
    evaluation_tokens: float

    @staticmethod
    def of(experiment: Experiment, sources: Sources, teacher: int, student: int) -> "Sizes":
        """Compute the means from the sets, within the limits of the configuration."""
        synthesis, longest = experiment.synthesis, experiment.student.max_length
        task = statistics.mean(len(seed.instruction) for seed in sources.seed_pool) / _CHARACTERS_PER_TOKEN
        instruction = min(synthesis.instruction.max_tokens, task + _TAGS)
        response = min(_RESPONSE_SHARE * synthesis.response.max_tokens, _LONGEST_RESPONSE)

        def tokens(tasks: Sequence[Task]) -> float:
            texts = ([*(turn["content"] for turn in task.before), task.instruction, task.response] for task in tasks)
            characters = (sum(map(len, parts)) for parts in texts)
            return sum(min(longest, _TAGS + count / _CHARACTERS_PER_TOKEN) for count in characters)

        return Sizes(
            teacher=teacher,
            student=student,
            prompt=_FRAME[experiment.teacher.prompt_style] + _shown_tokens(synthesis, task),
            instruction=instruction,
            response=response,
            example=min(longest, _TAGS + instruction + response),
            reference=len(sources.reference),
            evaluation=len(sources.evaluation),
            reference_tokens=tokens(sources.reference),
            evaluation_tokens=tokens(sources.evaluation),
        )


def _shown_tokens(synthesis: Synthesis, task: float) -> float:
    """Return the tokens of what a prompt shows, given those of a seed."""
    if isinstance(synthesis.strategy, GroundedStrategy):
        return _TOKENS_PER_WORD * synthesis.strategy.passage_words
    return synthesis.seeds_needed * (task + _TAGS)


def planned_stages(experiment: Experiment, sizes: Sizes) -> Iterator[PlannedStage]:
    """Yield the stages of an experiment, in approximate order."""
    comparison, influence, trained = experiment.comparison, experiment.influence, experiment.training.examples

    def synthesis(label: str, count: int) -> PlannedStage:
        return _synthesis(experiment, sizes, label, count)

    def training(label: str, recipe: Warmup | Training) -> PlannedStage:
        tokens = recipe.examples * recipe.epochs * sizes.example
        operations = _flops(sizes.student, experiment.student.lora, learn=tokens)
        return PlannedStage(label, f"{recipe.examples:,} examples", 1, operations)

    def measurement(label: str, count: int) -> PlannedStage:
        exact = _exact_measurements(influence, count)
        projected = 0 if influence.estimator == "exact" else count
        passes = int(exact > 0) + int(projected > 0)
        read = (_CHECKS * passes + exact) * sizes.reference_tokens
        learn = (projected + exact) * sizes.example + (sizes.reference_tokens if projected else 0)
        work = f"{count:,} examples, {influence.estimator}, {sizes.reference:,} reference examples"
        return PlannedStage(label, work, passes, _flops(sizes.student, read=read, learn=learn))

    def update(label: str, probing: int) -> PlannedStage:
        preferences = experiment.preferences
        across = preferences.pairs == "across_prompts"
        pairs = math.ceil((preferences.max_uses / 2 if across else _PAIRS_PER_EXAMPLE) * probing)
        pairs = min(preferences.max_pairs or pairs, pairs)
        tokens = pairs * (sizes.prompt + 2 * sizes.instruction)
        recipe = experiment.teacher_update
        operations = _flops(sizes.teacher, recipe.lora, read=tokens, learn=tokens * recipe.epochs)
        return PlannedStage(label, f"about {pairs:,} pairs", 1, operations)

    def evaluation(label: str) -> PlannedStage:
        operations = _flops(sizes.student, read=sizes.evaluation_tokens)
        return PlannedStage(f"{label}: held-out loss", f"{sizes.evaluation:,} examples", 1, operations)

    def training_and_evaluation(label: str, measured: bool = True) -> Iterator[PlannedStage]:
        yield synthesis(f"{label}: training set", trained)
        yield training(f"{label}: student training", experiment.training)
        if measured and comparison.influence_examples:
            count = min(comparison.influence_examples, trained)
            yield measurement(f"{label}: influence of the training set", count)
        yield evaluation(label)

    for number in range(1, experiment.iterations + 1):
        name = f"iteration {number}"
        warming = experiment.warmup.examples if number == 1 else 0
        probing = influence.probing_examples if number == 1 else influence.later_probing_examples
        yield synthesis(f"{name}: {'warm-up and ' if warming else ''}probing set", warming + probing)
        if warming:
            yield training(f"{name}: student warm-up", experiment.warmup)
        yield measurement(f"{name}: influence of the probing set", probing)
        yield update(f"{name}: teacher update", probing)
        yield from training_and_evaluation(name)
        if number == 1:
            yield evaluation("untrained student")
            if comparison.unmodified_teacher:
                yield from training_and_evaluation("unmodified teacher")
        for kept in range(1, comparison.teacher_checkpoints + 1):
            yield from training_and_evaluation(f"{name}, teacher checkpoint {kept}", measured=False)


def _synthesis(experiment: Experiment, sizes: Sizes, label: str, count: int) -> PlannedStage:
    """Plan the synthesis of `count` examples; an API's answers take no operations here."""
    candidates = math.ceil(count * experiment.synthesis.oversampling)
    prompts = math.ceil(candidates / experiment.synthesis.samples_per_prompt)
    prompt, write = prompts * sizes.prompt, candidates * sizes.instruction
    work, answers = f"{candidates:,} candidates, {count:,} examples", 0
    if experiment.synthesis.answers == "endpoint":
        answers, work = count, f"{work}, answered by an API"
    else:
        prompt, write = prompt + count * (sizes.instruction + _TAGS), write + count * sizes.response
    return PlannedStage(label, work, 2, _flops(sizes.teacher, prompt=prompt, write=write), answers)


def _exact_measurements(influence: Influence, count: int) -> int:
    """Estimate how many of `count` examples the configured estimator measures exactly."""
    if influence.estimator != "screened":
        return count if influence.estimator == "exact" else 0
    audited = min(count, influence.screening.audit_examples)
    return audited + math.ceil(_CONFIRMED * (count - audited))


def _flops(weights: int, lora: Lora | None = None, **tokens: float) -> dict[str, float]:
    """Compute FLOPs by kind of work from tokens by kind of work; with `lora`, an adapter learns."""
    backward = FROZEN_BACKWARD if lora else BACKWARD
    return {kind: (FORWARD + backward * (kind == "learn")) * weights * count for kind, count in tokens.items()}
