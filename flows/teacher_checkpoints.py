"""Evaluate checkpoints of a teacher update: train a student on the data of each (Figures 3a and 3b)."""

from pathlib import Path

from prefect import flow

from flows.methods.tailoring import write_training_set
from montessori_core.program import Row
from tasks.evaluation import StudentEvaluation, evaluate, summarize_loss
from tasks.run import Model, Run
from tasks.stage import Step
from tasks.students import train_on_set
from tasks.teachers import kept_teachers, reward_margins


@flow(flow_run_name="{run.experiment.name}: teacher checkpoints, iteration {number}", validate_parameters=False)
def evaluate_checkpoints(
    run: Run, number: int, updated: Model, student: StudentEvaluation, synthetic_pool: Path | None
) -> list[Row]:
    """Return the reward margin and the student's losses and scores of each kept teacher, the updated teacher last.

    The margin is the mean over the steps of the update since the checkpoint before.
    All teachers write their training sets from the same prompts, with demonstrations of the same `synthetic_pool`, and all
    students are trained with the same recipe.

    Args:
        run: the run.
        number: index of the iteration.
        updated: the updated teacher.
        student: evaluation of its student.
        synthetic_pool: training set of the last iteration.
    """
    kept = kept_teachers(updated)
    margins = reward_margins(updated, kept)
    evaluations: dict[int, StudentEvaluation] = {}
    for update, teacher in kept.items():
        folder = run.iteration(number) / "checkpoints" / f"step-{update}"
        step = Step(run, folder, f"iteration {number}, step {update}")
        synthesized = write_training_set(step, teacher, number, synthetic_pool)
        trained = train_on_set(step, synthesized.examples)
        evaluations[update] = evaluate(step.at("evaluation"), trained)
    evaluations[max(margins)] = student
    return [
        {
            "step": update,
            "margin": margins[update],
            "held_out_loss": (loss := summarize_loss(evaluation.losses))["mean"],
            "standard_error": loss["standard_error"],
            "scores": evaluation.benchmarks.scores,
        }
        for update, evaluation in evaluations.items()
    ]
