"""The loop that every method lives in: it proposes data, a student is trained on it, and its errors come back.

A method of your own is a module with a `Method`, named in a study as `module:NAME`:

    from flows.methods.method import Method, Proposal, Round
    from tasks.synthesis import synthesize

    def propose(now: Round) -> Proposal:
        teacher = now.run.initial_teacher()
        training = synthesize(now.step.at("training"), teacher, ...)
        return Proposal(training.examples, teacher)

    MINE = Method("mine", "What it does, in a line.", propose)

Build it from the functions in `tasks` and `flows.methods.tailoring`: what they compute is kept by its content, so that
methods share stages and an interrupted study goes on where it was.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from montessori_core.config import Experiment
from tasks.evaluation import StudentEvaluation
from tasks.run import Model, Run
from tasks.stage import Step


@dataclass(frozen=True)
class Proposal:
    """What a method proposes.

    Attributes:
        examples: training data.
        teacher: that wrote the last of it.
        student: one that the method trained by itself, in place of training on the examples; None is the rule.
    """

    examples: Path
    teacher: Model
    student: Model | None = None


@dataclass(frozen=True)
class Feedback:
    """What comes back: the proposal, the student trained on it, and what it is worth."""

    proposal: Proposal
    student: Model
    evaluated: StudentEvaluation


@dataclass(frozen=True)
class Round:
    """One turn of a method.

    Attributes:
        step: the method's own, for this round.
        number: counted from 1.
        rounds: how many there are.
        feedback: of the last round; None in the first.
    """

    step: Step
    number: int
    rounds: int
    feedback: Feedback | None

    @property
    def run(self) -> Run:
        """Experiment, sets and first models."""
        return self.step.run


def one_round(experiment: Experiment) -> int:
    """Rounds of a method without feedback."""
    return 1


@dataclass(frozen=True)
class Method:
    """A way to make training data.

    Attributes:
        name: in studies, folders and tables.
        description: for people, a line.
        propose: makes the data of a round.
        rounds: how many there are.
        needs: a part of the experiment that must be set for it.
        check: raises a UserError if the method cannot do with a run's sets; called before anything is computed.
        trains_student: the student it returns learned otherwise than from examples, all of its weights; so there is no data
            to try on other students.
    """

    name: str
    description: str
    propose: Callable[[Round], Proposal]
    rounds: Callable[[Experiment], int] = one_round
    needs: Literal["judge", "strong_teacher"] | None = None
    check: Callable[[Run], None] | None = None
    trains_student: bool = False
