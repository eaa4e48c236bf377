"""Methods of a study: all get the same inputs."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import ValidationError

from flows import study
from flows.methods import REGISTRY, llm2llm, seeds, self_reward, tailoring
from flows.methods import nomad as nomad_method
from flows.methods.method import Feedback, Proposal, Round
from flows.methods.tailoring import ProbingSet
from flows.study import open_study
from montessori_core.config import Sampling, Study, Training, parse_experiment
from montessori_core.data.sources import Task, write_tasks
from montessori_core.data.tables import EXAMPLES, read_table, table_from_rows, write_table
from montessori_core.errors import UserError
from montessori_core.files import write_json
from montessori_core.layout import COUNTS_FILE
from montessori_core.program import Row
from tasks import nomad
from tasks.benchmarks import BenchmarkResult
from tasks.evaluation import StudentEvaluation
from tasks.influence import influence_settings
from tasks.run import Model, Run
from tasks.stage import Step
from tasks.synthesis import SynthesisResult


@pytest.mark.parametrize("method", ["montessori", "self_instruct", "self_instruct_strong"])
def test_training_set_may_repeat_probing_set(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = Model("m", "0"), []
    synthesized = SynthesisResult(tmp_path / "instructions.parquet", tmp_path / "examples.parquet")

    def synthesize(*arguments: Any, **settings: Any) -> SynthesisResult:
        asked.append(settings)
        return synthesized

    monkeypatch.setattr(tailoring, "synthesize", synthesize)
    monkeypatch.setattr(tailoring, "probe", lambda *_: ProbingSet(synthesized, model, 1, 2))
    for stage in ("measure", "collect_preferences"):
        monkeypatch.setattr(tailoring, stage, lambda *_: tmp_path)
    monkeypatch.setattr(tailoring, "update_teacher", lambda *_, **__: model)
    monkeypatch.setattr(Run, "initial_teacher", lambda _: model)
    content = {"teacher": {"model": "t"}, "student": {"model": "s"}, "strong_teacher": {"model": "strong"}}
    run = Run(tmp_path, parse_experiment(content, "test"))
    REGISTRY[method].propose(Round(Step(run, tmp_path, method), 1, 1, None))
    (training,) = asked
    assert "earlier" not in training
    assert (training["draw"], training["seed_pool"]) == ("i1-training", None)


class Reached(Exception):
    """Raised when the stage under test gets its student."""


@pytest.mark.parametrize(
    ("method", "module", "stage"),
    [("llm2llm", llm2llm, "measure_training_loss"), ("self_reward", self_reward, "regenerate_responses")],
)
def test_first_round_trains_student_on_seeds(
    method: str, module: ModuleType, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {"teacher": {"model": "t"}, "student": {"model": "s"}, "judge": {"model": "j"}}
    run = Run(tmp_path, parse_experiment(content, "test"))
    text = dict.fromkeys(("prompt_id", "prompt", "raw_output", "instruction", "response"), "x")
    answered = [{"example_id": str(number), "response_finished": True, **text} for number in range(3)]
    write_table(table_from_rows(answered, EXAMPLES), tmp_path / "examples.parquet", EXAMPLES)
    first, seeded, last = (Model(name, "0") for name in ("first", "seeded", "last"))
    trained: list[Any] = []

    def train_student(*arguments: Any, **settings: Any) -> Model:
        trained.append(arguments[1:])
        return seeded

    def reach(*arguments: Any, **_: Any) -> None:
        raise Reached(next(one for one in arguments if one in (first, seeded, last)))

    monkeypatch.setattr(Run, "initial_student", lambda _: first)
    monkeypatch.setattr(Run, "initial_teacher", lambda _: Model("teacher", "0"))
    monkeypatch.setattr(seeds, "answer_seeds", lambda *_: tmp_path / "examples.parquet")
    monkeypatch.setattr(seeds, "train_student", train_student)
    monkeypatch.setattr(self_reward, "write_training_set", lambda *_, **__: SynthesisResult(tmp_path, tmp_path))
    monkeypatch.setattr(module, stage, reach)
    with pytest.raises(Reached) as reached:
        REGISTRY[method].propose(Round(Step(run, tmp_path, method), 1, 2, None))
    assert reached.value.args == (seeded,)
    assert trained == [(tmp_path / "examples.parquet", run.experiment.training, 3)]

    feedback = Feedback(Proposal(tmp_path, first), last, StudentEvaluation(tmp_path, BenchmarkResult([], None)))
    with pytest.raises(Reached) as reached:
        REGISTRY[method].propose(Round(Step(run, tmp_path, method), 2, 2, feedback))
    assert reached.value.args == (last,)
    assert len(trained) == 1


def write_reference(run: Run, count: int) -> None:
    """Write a reference set for a run, and two unused sets."""
    run.source_file("reference").parent.mkdir()
    for name in ("seed_pool", "reference", "evaluation"):
        write_tasks([Task(f"{name}-{n}", f"Count {n} rivers.", "Done.") for n in range(count)], run.source_file(name))


@pytest.mark.parametrize(("share", "real"), [(0.5, 2), (0.99, 3)])
def test_nomad_uses_its_sampling_and_recipe(
    share: float, real: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, model = {"learning_rate": 2e-5, "batch_size": 128, "epochs": 4}, Model("m", "0")
    content = {
        "teacher": {"model": "t"},
        "student": {"model": "s"},
        "synthesis": {"instruction": {"presence_penalty": 2.0, "repetition_penalty": 1.5}},
        "training": {"examples": 4, "response_tokens": 200},
        "nomad": {"training": recipe, "real_share": share},
    }
    run = Run(tmp_path, parse_experiment(content, "test"))
    write_reference(run, 9)
    (tmp_path / "training").mkdir()
    decoded: list[Sampling] = []

    def generate(*arguments: Any) -> tuple[list[Row], list[Path]]:
        decoded.append(arguments[4])
        text = " What is {}?\nAssistant: A word."
        names = [name for row in arguments[2] for name in row["example_ids"]]
        things = ["light", "a sonnet", "the tundra", "an oboe"]
        texts = [text.format(things[number % 4]) for number in range(len(names))]
        return [
            {"example_id": name, "prompt": "User:", "raw_output": text, "finish_reason": "stop"}
            for name, text in zip(names, texts, strict=True)
        ], []

    monkeypatch.setattr(nomad, "generate", generate)
    monkeypatch.setattr(nomad, "join_synthesis", nomad.join_synthesis.fn)
    monkeypatch.setattr("tasks.synthesis.create_table_artifact", lambda *_, **__: None)
    monkeypatch.setattr(nomad_method, "train_nomad_teacher", lambda *_: model)
    monkeypatch.setattr(nomad_method, "measure_norm_sim", lambda *_: tmp_path)
    monkeypatch.setattr(nomad_method, "mix_with_real", nomad.mix_with_real.fn)
    proposal = REGISTRY["nomad"].propose(Round(Step(run, tmp_path, "nomad"), 1, 1, None))
    assert set(decoded) == {Sampling(temperature=1.0, top_p=0.9, presence_penalty=0.0, max_tokens=2048)}
    assert proposal.recipe == Training.model_validate({**recipe, "examples": 4, "response_tokens": 200})
    mixed = read_table(proposal.examples, EXAMPLES)
    assert mixed.num_rows == 4
    assert mixed["prompt_id"].to_pylist().count("real") == real


def test_first_rows_of_nomad_mixture_keep_share(tmp_path: Path) -> None:
    """A student within `training.response_tokens` trains on the first rows of the table."""
    run = Run(tmp_path, parse_experiment({"teacher": {"model": "t"}, "student": {"model": "s"}}, "test"))
    write_reference(run, 30)
    texts = {"prompt_id": "", "prompt": "User:", "raw_output": "", "instruction": "Count ice.", "response": "Done."}
    written = [{**texts, "example_id": f"written-{n}", "response_finished": True} for n in range(20)]
    write_table(table_from_rows(written, EXAMPLES), tmp_path / "written.parquet", EXAMPLES)
    mixed = nomad.mix_with_real.fn(Step(run, tmp_path, "nomad"), tmp_path / "written.parquet", 20)
    real = [prompt == "real" for prompt in read_table(mixed, EXAMPLES)["prompt_id"].to_pylist()]
    assert (len(real), sum(real)) == (40, 20)
    assert 5 <= sum(real[:20]) <= 15


def test_equal_tokens_use_recipe_of_the_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, parse_experiment({"teacher": {"model": "t"}, "student": {"model": "s"}}, "test"))
    evaluated, teacher = StudentEvaluation(tmp_path, BenchmarkResult([], None)), Model("t", "0")
    own, ended = Training(learning_rate=2e-5, batch_size=128, epochs=4), {}
    for name, tokens, recipe in [("fewest", 50, None), ("nomad", 60, own), ("plain", 70, None)]:
        student = tmp_path / name
        student.mkdir()
        write_json({"response_tokens": tokens, "response_tokens_of_first_batch": 40}, student / COUNTS_FILE)
        ended[name] = Feedback(Proposal(student, teacher, recipe=recipe), Model(str(student), "0"), evaluated)
    used: dict[str, Training] = {}
    monkeypatch.setattr(study, "train_student", lambda _, examples, recipe, count: used.update({examples.name: recipe}))
    monkeypatch.setattr(study, "measure_loss", lambda *_: tmp_path)
    limit, losses = study.train_on_equal_tokens(run, ended, "plain")
    assert (limit, list(losses)) == (50, ["fewest", "nomad", "plain"])
    expected = {"nomad": own, "plain": run.experiment.training}
    assert used == {name: recipe.model_copy(update={"response_tokens": 50}) for name, recipe in expected.items()}


def test_later_settings_do_not_retrain_nomad_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executed: list[Any] = []
    monkeypatch.setattr(Step, "train", lambda *arguments: executed.append(arguments[2]) or Model("m", "0"))
    monkeypatch.setattr(Run, "initial_teacher", lambda _: Model("t", "0"))
    later = {"real_share": 0.1, "sampling": {"top_p": 0.7}, "training": {"epochs": 4}}
    for number, changes in enumerate(({}, later, {"epochs": 3})):
        content = {"teacher": {"model": "t"}, "student": {"model": "s"}, "nomad": changes}
        run = Run(tmp_path / str(number), parse_experiment(content, "test"))
        run.folder.mkdir()
        write_reference(run, 3)
        nomad.train_nomad_teacher(Step(run, tmp_path, "teacher"))
    assert executed[0] == executed[1] != executed[2]
    assert executed[2].recipe.epochs == 3


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({}, "nomad: 96 examples in batches of 128 train for 2 steps, .*; give a larger reference set"),
        ({"batch_size": 8, "teacher_examples": 30}, "nomad: 30 examples in batches of 8 train for 8 steps"),
        (
            {"batch_size": 8, "training": {"batch_size": 2000}},
            "nomad.training: 10000 examples in batches of 2000 train for 5 steps, .*; give more training.examples",
        ),
    ],
)
def test_nomad_refuses_sets_of_few_batches(
    changes: dict[str, Any], refusal: str, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=refusal):
        open_study(study_of_nomad(tiny_llama, nomad=changes), tmp_path / "refused")


def study_of_nomad(model: Path, **sections: Any) -> Study:
    experiment = {"teacher": {"model": str(model)}, "student": {"model": str(model)}, **sections}
    return Study.model_validate({"experiment": experiment, "methods": ["nomad"], "baseline": "nomad", "seeds": [0]})


def test_nomad_needs_full_batches(tiny_llama: Path, tmp_path: Path) -> None:
    cluster = {"resources": {"training": {"processes_per_node": 2}}}
    with pytest.raises(ValidationError, match=r"nomad.training.batch_size \(2\) must be a multiple"):
        study_of_nomad(
            tiny_llama, nomad={"training": {"batch_size": 2}}, cluster=cluster, teacher_update={"batch_size": 4}
        )
    fitting = {"batch_size": 8, "teacher_examples": 60, "training": {"batch_size": 128}}
    open_study(study_of_nomad(tiny_llama, nomad=fitting), tmp_path / "fits")


@pytest.mark.parametrize(
    ("preferences", "sequential"),
    [({"pairs": "across_prompts", "baseline": "null_step"}, False), ({"baseline": "null_step"}, True)],
)
def test_pairs_of_answers_can_be_measured(preferences: dict[str, Any], sequential: bool, tmp_path: Path) -> None:
    """The mean of a prompt, which then divides answers, is no baseline of a sequential test."""
    content = {
        "teacher": {"model": "t"},
        "student": {"model": "s"},
        "influence": {"estimator": "exact", "sequential": {}},
        "preferences": preferences,
    }
    step = Step(Run(tmp_path, parse_experiment(content, "test")), tmp_path, "test").pairing_answers()
    settings = influence_settings(step.experiment, "exact", {})
    assert (settings.sequential is not None) is sequential
    assert (settings.baseline is not None) is sequential
