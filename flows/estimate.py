"""What a run will do, and about how long that takes on this machine: said before its first job.

The model: a stage takes _JOB_SECONDS for each of its jobs and, for each kind of work, its operations (`flops`: two for each
weight and token forward, six forward and backward) / (this machine's GFLOP/s in a matrix product x the share of it that the
kind reaches). Tokens are typical ones, from the texts of the sets and the limits of the configuration. What is left out:
further rounds of synthesis, which the filters decide, and benchmarks.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from montessori_core.config import Experiment, Influence, Training, Warmup
from montessori_core.data.sources import Sources, Task
from montessori_core.models.flops import BACKWARD, FORWARD, weights_of
from montessori_core.provenance import record_speed
from montessori_core.speed import measure_gflops
from tasks.run import Run

_JOB_SECONDS = 3.0
"""To load a model and to save results, and between two jobs; jobs are forked from a warm process."""
_EFFICIENCY = {"prompt": 0.5, "write": 0.25, "read": 0.5, "learn": 0.5}
"""Share of the GFLOP/s of an fp32 matrix product: the teacher reads prompts and writes token by token, the student reads
and learns. From the FLOPs and seconds of a quickstart's stages, all in fp32 (docs/benchmarks.md)."""
_CHARACTERS_PER_TOKEN = 4.0
_FRAME = {"chat": 220, "completion": 60}  # tokens of a prompt beside its demonstrations
_TAGS = 10  # tokens around a demonstration, or around a turn of a chat
_WRITTEN = 0.8  # share of the token limit that responses take
_LONGEST_RESPONSE = 250  # tokens, however high the limit
_PAIRED = 0.7  # pairs for each probing example; the paper has 6,792 from 10,000
_CONFIRMED = 0.06  # share of the examples behind the audit that the screened estimator measures exactly
_CHECKS = 3  # evaluations of the reference set before the first example is measured


@dataclass(frozen=True)
class PlannedStage:
    """A stage, or a few that belong together.

    Attributes:
        name: as its progress bar has it.
        work: what it makes, for people.
        jobs: that are started one after the other.
        flops: floating-point operations by kind of work, see `_EFFICIENCY`.
    """

    name: str
    work: str
    jobs: int
    flops: dict[str, float]

    def seconds(self, gflops: float) -> float:
        """About how long it takes where a matrix product reaches so many GFLOP/s."""
        work = sum(count / (gflops * 1e9 * _EFFICIENCY[kind]) for kind, count in self.flops.items())
        return self.jobs * _JOB_SECONDS + work


@dataclass(frozen=True)
class Estimate:
    """What a run will do, and about how long that takes.

    Attributes:
        stages: in about their order.
        gflops: that a job of the run reaches on this machine; None where its jobs are not for this machine's processor.
    """

    stages: list[PlannedStage]
    gflops: float | None


def estimate_run(run: Run) -> Estimate:
    """Plan the stages of a run and, where its jobs use this machine's processor, measure and record its speed."""
    teacher, student = run.initial_teacher(), run.initial_student()
    sizes = Sizes.of(run.experiment, run.sources(), weights_of(Path(teacher.path)), weights_of(Path(student.path)))
    gflops = _speed_for(run.experiment)
    if gflops:
        record_speed(run.folder, gflops)
    return Estimate(list(planned_stages(run.experiment, sizes)), gflops)


def _speed_for(experiment: Experiment) -> float | None:
    """GFLOP/s that a job of the run reaches; None if its jobs are not for this machine's processor."""
    resources = dict(experiment.cluster.resources)
    if experiment.cluster.profile != "local" or any(own.gpus_per_node for own in resources.values()):
        return None
    return measure_gflops(experiment.cluster.resources.training.cpus_per_process)


@dataclass(frozen=True)
class Sizes:
    """Typical tokens of an experiment's texts, and the weights that they are multiplied with (see `flops`).

    Attributes:
        teacher, student: weights.
        prompt, instruction, response: tokens that the teacher reads and writes.
        example: tokens of an example as the student sees it.
        reference, evaluation: examples of these sets.
        reference_tokens, evaluation_tokens: of all of them together.
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
        """The means of the sets, within the limits of the configuration."""
        synthesis, longest = experiment.synthesis, experiment.student.max_length
        shown = synthesis.seed_demonstrations + synthesis.synthetic_demonstrations
        task = statistics.mean(len(seed.instruction) for seed in sources.seed_pool) / _CHARACTERS_PER_TOKEN
        instruction = min(synthesis.instruction.max_tokens, task + _TAGS)
        response = min(_WRITTEN * synthesis.response.max_tokens, _LONGEST_RESPONSE)

        def tokens(tasks: Sequence[Task]) -> float:
            characters = (len(task.instruction) + len(task.response) for task in tasks)
            return sum(min(longest, _TAGS + count / _CHARACTERS_PER_TOKEN) for count in characters)

        return Sizes(
            teacher=teacher,
            student=student,
            prompt=_FRAME[experiment.teacher.prompt_style] + shown * (task + _TAGS),
            instruction=instruction,
            response=response,
            example=min(longest, _TAGS + instruction + response),
            reference=len(sources.reference),
            evaluation=len(sources.evaluation),
            reference_tokens=tokens(sources.reference),
            evaluation_tokens=tokens(sources.evaluation),
        )


def planned_stages(experiment: Experiment, sizes: Sizes) -> Iterator[PlannedStage]:
    """Yield the stages of an experiment, in about their order."""
    comparison, influence, trained = experiment.comparison, experiment.influence, experiment.training.examples

    def synthesis(label: str, count: int) -> PlannedStage:
        candidates = math.ceil(count * experiment.synthesis.oversampling)
        prompts = math.ceil(candidates / experiment.synthesis.samples_per_prompt)
        prompt = prompts * sizes.prompt + count * (sizes.instruction + _TAGS)
        write = candidates * sizes.instruction + count * sizes.response
        work = f"{candidates:,} candidates, {count:,} examples"
        return PlannedStage(label, work, 2, _flops(sizes.teacher, prompt=prompt, write=write))

    def training(label: str, recipe: Warmup | Training) -> PlannedStage:
        tokens = recipe.examples * recipe.epochs * sizes.example
        return PlannedStage(label, f"{recipe.examples:,} examples", 1, _flops(sizes.student, learn=tokens))

    def measurement(label: str, count: int) -> PlannedStage:
        exact = _exact_measurements(influence, count)
        projected = 0 if influence.estimator == "exact" else count
        passes = int(exact > 0) + int(projected > 0)
        read = (_CHECKS * passes + exact) * sizes.reference_tokens
        learn = (projected + exact) * sizes.example + (sizes.reference_tokens if projected else 0)
        work = f"{count:,} examples, {influence.estimator}, {sizes.reference:,} reference examples"
        return PlannedStage(label, work, passes, _flops(sizes.student, read=read, learn=learn))

    def update(label: str, probing: int) -> PlannedStage:
        pairs = min(experiment.preferences.max_pairs or probing, math.ceil(_PAIRED * probing))
        tokens = pairs * (sizes.prompt + 2 * sizes.instruction)
        operations = _flops(sizes.teacher, read=tokens, learn=tokens * experiment.teacher_update.epochs)
        return PlannedStage(label, f"about {pairs:,} pairs", 1, operations)

    def evaluation(label: str) -> PlannedStage:
        operations = _flops(sizes.student, read=sizes.evaluation_tokens)
        return PlannedStage(f"{label}: held-out loss", f"{sizes.evaluation:,} examples", 1, operations)

    def student_of(label: str, measured: bool = True) -> Iterator[PlannedStage]:
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
        yield from student_of(name)
        if number == 1:
            yield evaluation("untrained student")
            if comparison.unmodified_teacher:
                yield from student_of("unmodified teacher")
        for kept in range(1, comparison.teacher_checkpoints + 1):
            yield from student_of(f"{name}, teacher {kept} on the way", measured=False)


def _exact_measurements(influence: Influence, count: int) -> int:
    """About how many of so many examples the configured estimator measures exactly."""
    if influence.estimator != "screened":
        return count if influence.estimator == "exact" else 0
    audited = min(count, influence.screening.audit_examples)
    return audited + math.ceil(_CONFIRMED * (count - audited))


def _flops(weights: int, **tokens: float) -> dict[str, float]:
    """Operations of so many tokens through so many weights, by kind of work."""
    return {kind: (FORWARD + BACKWARD * (kind == "learn")) * weights * count for kind, count in tokens.items()}
