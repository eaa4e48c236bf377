"""Training sets chosen from the probing set of iteration 1, for `select` and its controls `random` and `length_matched`."""

import random
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from flows.methods.method import Proposal, Round
from flows.methods.tailoring import measure, probe
from montessori_core.data.tables import EXAMPLES, read_table
from montessori_core.errors import UserError
from montessori_core.influence.table import read_measured
from montessori_core.seeding import seed_of
from tasks.run import Run
from tasks.stage import Step
from tasks.synthesis import write_examples

_TIMES = 10  # recommended probing examples for each that is chosen


def check_choice(run: Run) -> None:
    """Check that the probing set is larger than the training set that is chosen from it.

    Raises:
        UserError: it is not.
    """
    probing, training = run.experiment.influence.probing_examples, run.experiment.training.examples
    if probing <= training:
        raise UserError(
            f"influence.probing_examples: {probing} leaves no choice: select, random and length_matched choose "
            f"{training} of them (training.examples); raise it to {_TIMES * training}, {_TIMES} times training.examples"
        )


def measure_candidates(now: Round) -> tuple[Path, pa.Table]:
    """Return the example table of the probing set, and its influence table without rows whose status is not 'ok'.

    The stages are those of iteration 1, so other methods that measure influence share them.

    Raises:
        UserError: fewer rows have an influence than a student trains on.
    """
    step, required = Step.iteration(now.run, 1), now.run.experiment.training.examples
    probed = probe(step, 1, now.run.initial_teacher())
    measured = read_measured(measure(step, probed))
    if measured.num_rows < required:
        raise UserError(
            f"{now.step.label}: {measured.num_rows} of {probed.last - probed.first} probing examples have an influence, but "
            f"students train on {required}; lower training.examples, or start another study with more "
            "influence.probing_examples"
        )
    return probed.synthesized.examples, measured


def propose_subset(now: Round, examples: Path, ids: Sequence[str]) -> Proposal:
    """Propose some rows of an example table, shuffled with the experiment's seed."""
    table = read_table(examples, EXAMPLES)
    chosen = set(ids)
    rows = [row for row, name in enumerate(table["example_id"].to_pylist()) if name in chosen]
    random.Random(seed_of(now.run.experiment.seed, "subset")).shuffle(rows)
    return Proposal(write_examples(now.step, table.take(rows), [examples]), now.run.initial_teacher())
