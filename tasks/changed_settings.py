"""Settings that may change after a run has started, and the first stage that each affects."""

from pathlib import Path

from montessori_core.config import Experiment, differences, read_experiment
from montessori_core.errors import UserError

_FIRST_STAGES = {
    "preferences.": "preference pairs",
    "teacher_update.": "teacher update",
    "training.examples:": "training set",
    "training.": "student training",
}
"""The first stage that each changeable setting affects, in the order of the stages."""


def changed_settings(experiment: Experiment, config: Path) -> list[str]:
    """Return the settings that differ from those of a run, as `path: before -> after` lines.

    Raises:
        UserError: a stage before the preference pairs depends on a changed setting.
    """
    before = read_experiment(config)
    then, now = before.method(), experiment.method()
    if before.judge is None:
        then["judge"] = now["judge"]  # the judge may be added: nothing has been judged yet
    changed = differences(then, now)
    fixed = [line for line in changed if not line.startswith(tuple(_FIRST_STAGES))]
    if fixed:
        raise UserError(
            f"{config.parent}: this run was started with another configuration:\n  "
            + "\n  ".join(fixed)
            + "\nOf the method's settings, only preferences, teacher_update and training may change. "
            + "Use another --name for the new configuration, or "
            + f"resume the run unchanged: montessori resume {config.parent}"
        )
    return changed


def first_stage(changed: list[str], experiment: Experiment) -> str:
    """Return the name of the first stage that must be computed again, for messages."""
    if any(line.startswith("preferences.baseline:") for line in changed):
        # Exact influence is measured around the threshold of this baseline.
        if experiment.influence.sequential is not None:
            return "influence of the probing set"
        if experiment.influence.estimator == "screened":
            return "confirmation of influence near the threshold"
    return next(stage for setting, stage in _FIRST_STAGES.items() if any(line.startswith(setting) for line in changed))
