"""The interface of a method: it proposes data, a student is trained on it, and the method gets the student as feedback.

Your own method is a module with a `Method`; name it in a study as `module:NAME`:

    from flows.methods.method import Method, Proposal, Round
    from tasks.synthesis import synthesize

    def propose(now: Round) -> Proposal:
        teacher = now.run.initial_teacher()
        training = synthesize(now.step.at("training"), teacher, ...)
        return Proposal(training.examples, teacher)

    MINE = Method("mine", "What it does, in a line.", propose)

Build it from the functions in `tasks` and `flows.methods.tailoring`: results have keys of their content, so methods share
stages and an interrupted study resumes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from montessori_core.config import Experiment, Training
from tasks.evaluation import StudentEvaluation
from tasks.run import Model, Run
from tasks.stage import Step


@dataclass(frozen=True)
class Proposal:
    """Training data that a method proposes.

    Attributes:
        examples: example table.
        teacher: teacher that wrote the last examples.
        student: student that the method has trained itself; None: train a student on the examples.
        recipe: recipe of that training; None: the experiment's.
    """

    examples: Path
    teacher: Model
    student: Model | None = None
    recipe: Training | None = None


@dataclass(frozen=True)
class Feedback:
    """A proposal, the student trained on it, the student's evaluation, and the feedback of the round before."""

    proposal: Proposal
    student: Model
    evaluated: StudentEvaluation
    previous: "Feedback | None" = None


@dataclass(frozen=True)
class Round:
    """One round of a method.

    Attributes:
        step: step of the method in this round.
        number: index of the round, from 1.
        rounds: number of rounds.
        feedback: feedback of the last round; None in the first.
    """

    step: Step
    number: int
    rounds: int
    feedback: Feedback | None

    @property
    def run(self) -> Run:
        """The run, with experiment, sets and initial models."""
        return self.step.run


@dataclass(frozen=True)
class Method:
    """A way to make training data.

    Attributes:
        name: name in studies, folders and tables.
        description: one line for the list of methods.
        propose: proposes the data of a round.
        rounds: returns the number of rounds for an experiment.
        needs: section of the experiment that must be set.
        check: raises a UserError if a run's sets are unsuitable; called before anything is computed.
        trains_student: whether the method trains all weights of the student itself, not by fine-tuning on examples; it then
            has no data for transfer students.
    """

    name: str
    description: str
    propose: Callable[[Round], Proposal]
    rounds: Callable[[Experiment], int] = lambda experiment: 1
    needs: Literal["judge", "strong_teacher"] | None = None
    check: Callable[[Run], None] | None = None
    trains_student: bool = False
