"""Settings that may change after a run has started, and the first stage that each affects."""

from pathlib import Path

from montessori_core import layout
from montessori_core.config import Experiment, differences, read_experiment
from tasks.resume import refusal_of_changes

_FIRST_STAGES = {
    "influence.": "influence of the probing set",
    "preferences.": "preference pairs",
    "teacher_update.": "teacher update",
    "comparison.teacher_checkpoints:": "teacher update",
    "training.examples:": "training set",
    "training.": "student training",
    "comparison.": "comparison",
}
"""The first stage that each changeable setting affects, in the order of the stages."""
_FIXED = ("influence.probing_examples:", "influence.later_probing_examples:")  # they decide what the teacher writes


def changed_settings(before: Experiment, experiment: Experiment, config: Path) -> list[str]:
    """Return the settings that differ from those of a run, as `path: before -> after` lines.

    Args:
        before: the experiment that the run was opened with, whatever its configuration file says now.
        experiment: the experiment to continue with.
        config: the configuration file of the run.

    Raises:
        UserError: a stage before the influence depends on a changed setting.
    """
    changed = differences_of_method(before, experiment)
    fixed = [line for line in changed if line.startswith(_FIXED) or not line.startswith(tuple(_FIRST_STAGES))]
    if fixed:
        may_change = (
            "Of the method's settings, only influence (but for the numbers of probing examples), preferences, "
            "teacher_update, training and comparison may change."
        )
        if differences_of_method(before, read_experiment(config)):
            may_change += f" {config} was edited; its former settings are in {layout.OPENED} beside it."
        raise refusal_of_changes(config.parent, fixed, may_change)
    return changed


def differences_of_method(before: Experiment, experiment: Experiment) -> list[str]:
    """Return the settings of the method that differ, as `path: before -> after` lines."""
    then, now = before.identity(), experiment.identity()
    if before.judge is None:
        then["judge"] = now["judge"]  # the judge may be added: nothing has been judged yet
    return differences(then, now)


def first_stage(changed: list[str], experiment: Experiment) -> str:
    """Return the name of the first stage that must be computed again, for messages."""
    first = next(setting for setting in _FIRST_STAGES if any(line.startswith(setting) for line in changed))
    if first == "preferences." and any(line.startswith("preferences.baseline:") for line in changed):
        # Exact influence is measured around the threshold of this baseline.
        if experiment.influence.sequential is not None:
            return _FIRST_STAGES["influence."]
        if experiment.influence.estimator == "screened":
            return "confirmation of influence near the threshold"
    return _FIRST_STAGES[first]
