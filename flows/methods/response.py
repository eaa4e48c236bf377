"""Optimisation ablation of Table 2: the teacher learns which of its responses to an instruction help the student.

It answers its training set itself, whatever `synthesis.answers` is: its answers are what it has learned.
"""

from flows.methods.method import Method, Proposal, Round
from flows.methods.tailoring import probe, write_training_set
from montessori_core.data.tables import EXAMPLES, read_table
from tasks.influence import collect_influence
from tasks.stage import Step
from tasks.synthesis import regenerate_responses
from tasks.teachers import collect_preferences, update_teacher


def _propose(now: Round) -> Proposal:
    step, teacher = now.step.pairing_answers(), now.run.initial_teacher()
    probed = probe(Step.iteration(now.run, 1), 1, teacher)
    # As many measurements as the other methods: several responses per instruction, so fewer instructions.
    instructions = max(1, (probed.last - probed.first) // now.run.experiment.synthesis.samples_per_prompt)
    answering, examples = step.at("answers", "several responses to an instruction"), probed.synthesized.examples
    answered = regenerate_responses(
        answering, teacher, examples, probed.first, probed.first + instructions, draw="answers"
    )
    measuring, count = step.at("influence", "influence of the responses"), read_table(answered, EXAMPLES).num_rows
    influence = collect_influence(measuring, probed.student, answered, 0, count, paired=True)
    preferences = collect_preferences(step, answered, influence)
    updated = update_teacher(step.at("teacher", "teacher update"), teacher, preferences, answered=answered)
    training = write_training_set(step, updated, answerer=updated)
    return Proposal(training.examples, updated)


RESPONSE = Method("response", "DPO of the teacher on the local data influence of its responses.", _propose)
