"""The utility ablations of Table 2: another signal stands in for the influence of the teacher's instructions."""

from collections.abc import Callable
from pathlib import Path

from flows.methods.environment import Method, Proposal, Round
from flows.methods.tailoring import Probed, probe
from montessori_core.schema import UTILITY_PREFERENCES
from tasks.synthesis import synthesize
from tasks.teachers import collect_utility_preferences, update_teacher
from tasks.utility import ask_judge, measure_training_loss


def _propose(now: Round, measure: Callable[[Round, Probed], Path]) -> Proposal:
    run, teacher = now.run, now.run.first_teacher()
    probed = probe(run, 1, teacher, None, None)
    examples = probed.synthesized.examples
    preferences = collect_utility_preferences(run, now.folder, now.label, examples, measure(now, probed))
    updated = update_teacher(run, now.folder / "teacher", now.label, teacher, preferences, UTILITY_PREFERENCES)
    training = synthesize(
        run,
        now.folder / "training",
        f"{now.label}: training set",
        updated,
        count=run.experiment.training.examples,
        draw="i1-training",
        earlier=[examples],
        synthetic_pool=None,
    )
    return Proposal(training.examples, updated)


def _training_loss(now: Round, probed: Probed) -> Path:
    label, examples = f"{now.label}: training loss", probed.synthesized.examples
    return measure_training_loss(
        now.run, now.folder / "utility", label, probed.student, examples, probed.first, probed.last
    )


def _judgement(now: Round, probed: Probed) -> Path:
    label, examples = f"{now.label}: judge", probed.synthesized.examples
    return ask_judge(now.run, now.folder / "utility", label, examples, probed.first, probed.last)


TRAINING_LOSS = Method(
    "training_loss",
    "DPO of the teacher towards instructions on which the student's loss is high.",
    lambda now: _propose(now, _training_loss),
)
LLM_JUDGE = Method(
    "llm_judge",
    "DPO of the teacher towards instructions whose examples a judge behind an API scores high.",
    lambda now: _propose(now, _judgement),
    needs="judge",
)
