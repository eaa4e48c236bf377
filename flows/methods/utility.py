"""Another signal in place of the influence of the teacher's instructions: the utility ablations of Table 2, and ARTE."""

from collections.abc import Callable
from pathlib import Path

from flows.methods.environment import Method, Proposal, Round
from flows.methods.tailoring import Probed, probe, write_training_set
from montessori_core.schema import UTILITY_PREFERENCES
from tasks.teachers import collect_utility_preferences, update_teacher
from tasks.utility import ask_judge, measure_in_context, measure_training_loss


def _propose(now: Round, measure: Callable[[Round, Probed], Path]) -> Proposal:
    run, teacher = now.run, now.run.first_teacher()
    probed = probe(run, 1, teacher, None, None)
    examples = probed.synthesized.examples
    preferences = collect_utility_preferences(run, now.folder, now.label, examples, measure(now, probed))
    updated = update_teacher(
        run, now.folder / "teacher", f"{now.label}: teacher update", teacher, preferences, UTILITY_PREFERENCES
    )
    training = write_training_set(run, now.folder / "training", now.label, updated)
    return Proposal(training.examples, updated)


def _training_loss(now: Round, probed: Probed) -> Path:
    label, examples = f"{now.label}: training loss", probed.synthesized.examples
    return measure_training_loss(
        now.run, now.folder / "utility", label, probed.student, examples, probed.first, probed.last
    )


def _demonstration(now: Round, probed: Probed) -> Path:
    label, examples = f"{now.label}: worth as a demonstration", probed.synthesized.examples
    return measure_in_context(
        now.run, now.folder / "utility", label, now.run.first_student(), examples, probed.first, probed.last
    )


def _judgement(now: Round, probed: Probed) -> Path:
    label, examples = f"{now.label}: judge", probed.synthesized.examples
    return ask_judge(now.run, now.folder / "utility", label, examples, probed.first, probed.last)


TRAINING_LOSS = Method(
    "training_loss",
    "DPO of the teacher towards instructions on which the student's loss is high.",
    lambda now: _propose(now, _training_loss),
)
ARTE = Method(
    "arte",
    "DPO of the teacher towards instructions whose examples, shown before the reference set's, help the student with it.",
    lambda now: _propose(now, _demonstration),
)
LLM_JUDGE = Method(
    "llm_judge",
    "DPO of the teacher towards instructions whose examples a judge behind an API scores high.",
    lambda now: _propose(now, _judgement),
    needs="judge",
)
