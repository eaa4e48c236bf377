"""Control of `select`: a random draw of the same size from the same probing set; no influence is measured."""

import random

from flows.methods.method import Method, Proposal, Round
from flows.methods.subset import check_choice, propose_subset
from flows.methods.tailoring import write_probing_set
from montessori_core.data.tables import EXAMPLES, read_table
from montessori_core.seeding import seed_of
from tasks.stage import Step


def _propose(now: Round) -> Proposal:
    run, experiment = now.run, now.run.experiment
    warming, probing = experiment.warmup.examples, experiment.influence.probing_examples
    written = write_probing_set(Step.iteration(run, 1), 1, run.initial_teacher(), warming, probing)
    ids = read_table(written.examples, EXAMPLES, ["example_id"])["example_id"].to_pylist()
    chosen = draw(ids[warming:], experiment.training.examples, seed_of(experiment.seed, "random"))
    return propose_subset(now, written.examples, chosen)


def draw(ids: list[str], count: int, seed: int) -> list[str]:
    """Draw `count` ids without replacement."""
    return random.Random(seed).sample(ids, count)


RANDOM = Method("random", "A random draw from the unmodified teacher's probing set.", _propose, check=check_choice)
