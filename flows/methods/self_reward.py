"""Self-Reward (Yuan et al., 2024): the student answers, a judge scores, and DPO trains the student on its own answers.

The student is first trained on the answered seeds (SFT, Appendix E.3). The judge is the student itself, or a model behind an
API if the experiment has one. The unmodified teacher writes the instructions.
"""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from flows.methods.method import Method, Proposal, Round
from flows.methods.seeds import answer_seed_pool, train_on_seeds
from flows.methods.tailoring import write_training_set
from montessori_core.data.tables import EXAMPLES, UTILITY, UTILITY_PREFERENCES, read_table, write_table
from montessori_core.influence.preferences import best_of_each_prompt
from tasks.signals import ask_judge, judge_own_responses
from tasks.stage import Step
from tasks.synthesis import join_examples, regenerate_responses
from tasks.teachers import collect_utility_preferences, update_teacher


def _propose(now: Round) -> Proposal:
    run, step = now.run, now.step
    student = now.feedback.student if now.feedback else train_on_seeds(run, answer_seed_pool(run))
    shared = Step(run, step.folder.parent, "self_reward")
    # The student answers the instructions: the responses of this set are not used, so no endpoint is asked for them.
    teacher = run.initial_teacher()
    instructions = write_training_set(shared, teacher, folder="instructions", answerer=teacher)
    first, last = (run.experiment.training.examples * number // now.rounds for number in (now.number - 1, now.number))
    answering = step.at("answers", "the student's responses")
    answered = regenerate_responses(
        answering, student, instructions.examples, first, last, draw=f"self-reward-{now.number}"
    )
    answers = read_table(answered, EXAMPLES).num_rows
    if run.experiment.judge is not None:
        scores = ask_judge(step.at("scores", "judge"), answered, 0, answers, response_only=True)
    else:
        scores = judge_own_responses(step.at("scores", "the student's judgements"), student, answered)
    preferences = collect_utility_preferences(step, answered, scores, extremes=True)
    update = step.at("update", "student update")
    updated = update_teacher(update, student, preferences, UTILITY_PREFERENCES, answered=answered, lora=False)
    best = _write_best(step, answered, scores)
    if now.feedback:
        best = join_examples(step, [now.feedback.proposal.examples, best])
    return Proposal(best, run.initial_teacher(), student=updated)


@task(task_run_name="{step.label}: best responses", cache_policy=NO_CACHE, persist_result=False)
def _write_best(step: Step, answered: Path, scores: Path) -> Path:
    best = best_of_each_prompt(read_table(answered, EXAMPLES), read_table(scores, UTILITY))
    path = step.folder / "best.parquet"
    write_table(best, path, EXAMPLES)
    return path


SELF_REWARD = Method(
    "self_reward",
    "The student, trained on the seeds, answers the unmodified teacher's instructions; DPO trains it on the answers that a "
    "judge, or the student itself, prefers; two rounds.",
    _propose,
    rounds=lambda experiment: 2,
    trains_student=True,
)
