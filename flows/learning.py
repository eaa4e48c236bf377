"""What the teacher of `montessori` learned in a study (Figure 3), and what it took (Table 7)."""

from collections.abc import Collection, Mapping
from pathlib import Path

from prefect import flow

from cluster.usage import use_of
from flows.methods.method import Feedback
from flows.methods.montessori import MONTESSORI
from flows.methods.tailoring import measure_training_set, probe
from flows.teacher_checkpoints import evaluate_checkpoints
from montessori_core import layout
from montessori_core.data.tables import EXAMPLES, INFLUENCE, PREFERENCES, read_table
from montessori_core.influence.preferences import threshold_of
from montessori_core.influence.table import summarize_influence
from montessori_core.program import Row
from tasks.evaluation import summarize_loss
from tasks.run import Run
from tasks.stage import Step


@flow(flow_run_name="{run.experiment.name}: what the teacher learned", validate_parameters=False)
def follow_teacher(run: Run, ended: Mapping[str, Feedback], baseline: str, stages: Collection[Path]) -> Row:
    """Measure the influence of two training sets, and evaluate the teacher's checkpoints, if `comparison` asks for them.

    Args:
        run: the run of a seed, in the study's folder.
        ended: the last round of `montessori`, and of the method that gains are over.
        baseline: name of that method.
        stages: stages of `montessori`.

    Returns:
        Of this seed: `influence`, a row for each of the two methods, measured on the warm student of iteration 1, with the
        path of its table in the study's folder; `checkpoints`, a row for each evaluated teacher of the last update;
        `seconds`, job seconds per example in iteration 1, by what they were for.
    """
    seconds = _seconds(run.iteration(1), stages)
    rows: Row = {"seed": run.experiment.seed, "influence": [], "checkpoints": [], "seconds": seconds}
    if run.experiment.comparison.influence_examples:
        rows["influence"] = _measure_training_sets(run, ended)
    if run.experiment.comparison.teacher_checkpoints:
        last = ended[MONTESSORI.name]
        pool = last.previous.proposal.examples if last.previous else None
        untailored = summarize_loss(ended[baseline].evaluated.losses)["mean"]
        evaluated = evaluate_checkpoints(run, run.experiment.iterations, last.proposal.teacher, last.evaluated, pool)
        rows["checkpoints"] = [{**row, "gain": untailored - row["held_out_loss"]} for row in evaluated]
    return rows


def _measure_training_sets(run: Run, ended: Mapping[str, Feedback]) -> list[Row]:
    probed = probe(Step.iteration(run, 1), 1, run.initial_teacher())
    probing = read_table(run.iteration(1) / layout.INFLUENCE, INFLUENCE)
    threshold = threshold_of(probing, run.experiment.preferences.baseline)
    rows = []
    for name, feedback in ended.items():
        step = Step(run, run.method(name), name)
        table = measure_training_set(step, probed.student, feedback.proposal.examples)
        assert table is not None
        summary = summarize_influence(read_table(table, INFLUENCE), threshold)
        rows.append({"method": name, "table": str(table.relative_to(run.folder.parent)), **summary})
    return rows


def _seconds(iteration: Path, stages: Collection[Path]) -> dict[str, float]:
    """Return the job seconds of an iteration per example, measured example and preference pair.

    Its folder may have stages of earlier settings, too, which are not among the `stages` of the method.
    """
    examples = read_table(iteration / layout.EXAMPLES, EXAMPLES, ["example_id"]).num_rows
    measured = read_table(iteration / layout.INFLUENCE, INFLUENCE, ["example_id"]).num_rows
    pairs = read_table(iteration / layout.PREFERENCES, PREFERENCES, ["prompt_id"]).num_rows
    counts = {"instructions": examples, "responses": examples, "influence": measured, "teacher": pairs}
    return {
        name: sum(use_of(stage).seconds for stage in iteration.glob(f"{name}*") if stage in stages) / count
        for name, count in counts.items()
    }
