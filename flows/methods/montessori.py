"""Montessori-Instruct: DPO of the teacher on the influence of its data on the student."""

from flows.methods.method import Method, Proposal, Round
from flows.methods.tailoring import tailor
from tasks.stage import Step


def _propose(now: Round) -> Proposal:
    last = now.feedback
    tailored = tailor(
        Step.iteration(now.run, now.number),
        now.number,
        last.proposal.teacher if last else now.run.initial_teacher(),
        last.student if last else None,
        last.proposal.examples if last else None,
    )
    return Proposal(tailored.training.examples, tailored.teacher)


MONTESSORI = Method(
    "montessori",
    "DPO of the teacher on the local data influence of its instructions.",
    _propose,
    rounds=lambda experiment: experiment.iterations,
)
