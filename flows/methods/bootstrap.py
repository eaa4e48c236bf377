"""Bootstrap ablation of Table 2: the most influential half of the probing set become the demonstrations."""

from pathlib import Path

from flows.methods.method import Method, Proposal, Round
from flows.methods.tailoring import measure, probe, write_training_set
from montessori_core.data.sources import Task
from montessori_core.data.tables import EXAMPLES, read_table
from montessori_core.influence.preferences import upper_half
from montessori_core.influence.table import read_measured
from tasks.stage import Step


def _propose(now: Round) -> Proposal:
    step, teacher = Step.iteration(now.run, 1), now.run.initial_teacher()
    probed = probe(step, 1, teacher)
    seeds = most_influential(probed.synthesized.examples, measure(step, probed))
    training = write_training_set(now.step, teacher, seed_pool=seeds)
    return Proposal(training.examples, teacher)


def most_influential(examples: Path, influence: Path) -> list[Task]:
    """Return the half of the measured examples with the highest influence, as demonstrations."""
    measured = read_measured(influence)
    chosen = set(upper_half(measured["example_id"].to_pylist(), measured["influence_student"].to_pylist()))
    rows = read_table(examples, EXAMPLES, ["example_id", "instruction"]).to_pylist()
    return [Task(**row) for row in rows if row["example_id"] in chosen]


BOOTSTRAP = Method("bootstrap", "The unmodified teacher is shown the most influential half of what it wrote.", _propose)
