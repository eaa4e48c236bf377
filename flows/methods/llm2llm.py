"""LLM2LLM (Lee et al., 2024): more of what the student finds hard, in rounds."""

from flows.methods.environment import Method, Proposal, Round
from montessori_core.schema import EXAMPLES, REFERENCE_LOSS, read_table
from montessori_core.selection import upper_half
from montessori_core.sources import Task
from tasks.evaluation import evaluate
from tasks.synthesis import answer_seeds, join_examples, synthesize


def _propose(now: Round) -> Proposal:
    run, teacher = now.run, now.run.first_teacher()
    answered = answer_seeds(run, run.folder / "answered-seeds", "the teacher answers the seed pool", teacher)
    tasks = [
        Task(row["example_id"], row["instruction"], row["response"])
        for row in read_table(answered, EXAMPLES).to_pylist()
    ]
    student = now.feedback.student if now.feedback else run.first_student()
    losses = evaluate(
        run, now.folder / "seed-loss", f"{now.label}: loss on the seeds", student, tasks, upstream=[answered]
    )
    hard = set(hardest_half(read_table(losses, REFERENCE_LOSS).to_pylist()))
    last = now.feedback.proposal.examples if now.feedback else None
    # Every round adds its share, so that the last student sees as many examples as any other method's.
    have = read_table(last, EXAMPLES).num_rows if last else 0
    wanted = run.experiment.training.examples * now.number // now.rounds - have
    training = synthesize(
        run,
        now.folder / "training",
        f"{now.label}: more of what is hard",
        teacher,
        count=wanted,
        draw=f"llm2llm-{now.number}",
        earlier=[last] if last else [],
        synthetic_pool=None,
        seed_pool=[task for task in run.sources().seed_pool if task.id in hard],
    )
    if last is None:
        return Proposal(training.examples, teacher)
    path = now.folder / "examples.parquet"
    return Proposal(join_examples(f"{now.label}: all so far", [last, training.examples], path), teacher)


def hardest_half(losses: list[dict[str, object]]) -> list[str]:
    """Ids of the rows of a loss table with the highest loss per token."""
    ids = [str(row["example_id"]) for row in losses]
    return upper_half(ids, [float(row["loss"]) / int(row["response_tokens"]) for row in losses])  # type: ignore[arg-type, call-overload]


LLM2LLM = Method(
    "llm2llm",
    "The unmodified teacher is shown the half of the seeds on which the student's loss is highest; two rounds.",
    _propose,
    rounds=lambda experiment: 2,
)
