"""Other preference signals than influence: the utility ablations of Table 2, and ARTE."""

from collections.abc import Callable
from pathlib import Path

from flows.methods.method import Method, Proposal, Round
from flows.methods.tailoring import ProbingSet, probe, write_training_set
from montessori_core.data.tables import UTILITY_PREFERENCES
from tasks.signals import ask_judge, measure_in_context, measure_training_loss
from tasks.stage import Step
from tasks.teachers import collect_utility_preferences, update_teacher


def _propose(now: Round, measure: Callable[[Round, ProbingSet], Path]) -> Proposal:
    step, teacher = now.step, now.run.initial_teacher()
    probed = probe(Step.iteration(now.run, 1), 1, teacher)
    preferences = collect_utility_preferences(step, probed.synthesized.examples, measure(now, probed))
    updated = update_teacher(step.at("teacher", "teacher update"), teacher, preferences, UTILITY_PREFERENCES)
    training = write_training_set(step, updated)
    return Proposal(training.examples, updated)


def _training_loss(now: Round, probed: ProbingSet) -> Path:
    step, examples = now.step.at("utility", "training loss"), probed.synthesized.examples
    return measure_training_loss(step, probed.student, examples, probed.first, probed.last)


def _demonstration(now: Round, probed: ProbingSet) -> Path:
    step, examples = now.step.at("utility", "value as a demonstration"), probed.synthesized.examples
    return measure_in_context(step, now.run.initial_student(), examples, probed.first, probed.last)


def _judgement(now: Round, probed: ProbingSet) -> Path:
    return ask_judge(now.step.at("utility", "judge"), probed.synthesized.examples, probed.first, probed.last)


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
