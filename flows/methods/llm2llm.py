"""LLM2LLM (Lee et al., 2024): more data like the seeds with a high loss, in rounds; the first student trains on the seeds."""

from pathlib import Path

import pyarrow.compute as pc

from flows.methods.method import Method, Proposal, Round
from flows.methods.seeds import answer_seed_pool, train_on_seeds
from montessori_core.data.tables import EXAMPLES, UTILITY, read_table
from montessori_core.influence.preferences import upper_half
from tasks.signals import measure_training_loss
from tasks.synthesis import join_examples, synthesize


def _propose(now: Round) -> Proposal:
    run, step, teacher = now.run, now.step, now.run.initial_teacher()
    answered = answer_seed_pool(run)
    student = now.feedback.student if now.feedback else train_on_seeds(run, answered)
    count = read_table(answered, EXAMPLES).num_rows
    losses = measure_training_loss(step.at("seed-loss", "loss on the seeds"), student, answered, 0, count)
    hard = set(hardest_half(losses))
    last = now.feedback.proposal.examples if now.feedback else None
    # Rounds add equal shares, so that the last student trains on as many examples as in any other method.
    existing = read_table(last, EXAMPLES).num_rows if last else 0
    missing = run.experiment.training.examples * now.number // now.rounds - existing
    training = synthesize(
        step.at("training", "examples like the hardest seeds"),
        teacher,
        missing,
        draw=f"llm2llm-{now.number}",
        earlier=[last] if last else [],
        seed_pool=[task for task in run.sources().seed_pool if task.example_id in hard],
    )
    if last is None:
        return Proposal(training.examples, teacher)
    return Proposal(join_examples(step, [last, training.examples]), teacher)


def hardest_half(losses: Path) -> list[str]:
    """Return the ids of the half of a utility table with the highest loss per token; rows without a loss do not count."""
    table = read_table(losses, UTILITY)
    measured = table.filter(pc.is_valid(table["utility"]))
    return upper_half(measured["example_id"].to_pylist(), measured["utility"].to_pylist())


LLM2LLM = Method(
    "llm2llm",
    "The unmodified teacher is shown the half of the seeds on which the student's loss is highest; two rounds.",
    _propose,
    rounds=lambda experiment: 2,
)
