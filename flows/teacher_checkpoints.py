"""What the teachers on the way through an update are worth (Figures 3a and 3b): a student is trained on the data of each."""

from pathlib import Path

from prefect import flow

from flows.methods.tailoring import TailoringResult, write_training_set
from montessori_core.program import Row
from tasks.evaluation import StudentEvaluation, evaluate, summarize_loss
from tasks.run import Run
from tasks.stage import Step
from tasks.students import train_student
from tasks.teachers import kept_teachers, reward_margins


@flow(flow_run_name="{run.experiment.name}: teachers on the way, iteration {number}", validate_parameters=False)
def evaluate_checkpoints(
    run: Run, number: int, tailored: TailoringResult, student: StudentEvaluation, synthetic_pool: Path | None
) -> list[Row]:
    """Reward margin and student's worth at each kept teacher; the updated teacher, and its `student`, come last.

    Each writes its training set from the same prompts, with demonstrations of the same `synthetic_pool`, and each student is
    trained by the same recipe.
    """
    margins = reward_margins(tailored.teacher)
    worth: dict[int, StudentEvaluation] = {}
    for step, teacher in kept_teachers(tailored.teacher).items():
        folder = run.iteration(number) / "checkpoints" / f"step-{step}"
        own = Step(run, folder, f"iteration {number}, step {step}")
        written = write_training_set(own, teacher, number, synthetic_pool)
        training = run.experiment.training
        trained = train_student(own.at("student", "student training"), written.examples, training, training.examples)
        worth[step] = evaluate(own.at("evaluation"), trained)
    worth[max(margins)] = student
    return [
        {
            "step": step,
            "margin": margins[step],
            "held_out_loss": (loss := summarize_loss(one.losses))["mean"],
            "standard_error": loss["standard_error"],
            "scores": one.benchmarks.scores,
        }
        for step, one in worth.items()
    ]
