"""Configuration: strict, described, and unchanged by a round trip."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from flows.cli.influence import influence
from montessori_core.config import (
    Benchmarks,
    Cluster,
    DataSource,
    Endpoint,
    Experiment,
    Influence,
    OwnFilter,
    Resources,
    Sampling,
    Slurm,
    Student,
    Synthesis,
    Teacher,
    Training,
    differences,
    dump_yaml,
    parse,
    parse_experiment,
    read_cluster,
    read_experiment,
    read_study,
    write_yaml,
)
from montessori_core.errors import ConfigError
from montessori_core.synthesis.prompts import check_decoding
from support import CONFIGS
from tasks.influence import influence_settings

MINIMAL = {"teacher": {"model": "t"}, "student": {"model": "s"}}


def sections(model: type[BaseModel]) -> set[type[BaseModel]]:
    found = {model}
    for field in model.model_fields.values():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found |= sections(kind)
    return found


def test_every_field_is_described() -> None:
    missing = [
        f"{section.__name__}.{name}"
        for section in sections(Experiment)
        for name, field in section.model_fields.items()
        if not field.description
    ]
    assert not missing


@pytest.mark.parametrize("path", sorted((CONFIGS).glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configuration_survives_a_round_trip(path: Path) -> None:
    experiment = read_experiment(path)
    assert parse_experiment(yaml.safe_load(dump_yaml(experiment.model_dump(mode="json"))), "round trip") == experiment


@pytest.mark.parametrize("path", sorted((CONFIGS).glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configuration_leaves_closing_tags_likely(path: Path) -> None:
    synthesis = read_experiment(path).synthesis
    assert synthesis.instruction.repetition_penalty == 1.0
    assert check_decoding(synthesis) == []


def test_repetition_penalty_matters_only_where_instructions_have_tags() -> None:
    decoding = {"instruction": {"repetition_penalty": 1.5}}
    (warning,) = check_decoding(Synthesis.model_validate(decoding))
    assert "which has </instruction>" in warning
    assert check_decoding(Synthesis.model_validate(decoding | {"strategy": "magpie"})) == []


@pytest.mark.guarantee("names that lead out of the run root")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"warmpu": {}}, "warmpu: unknown key; remove it or correct its spelling (did you mean 'warmup'?)"),
        (
            {"synthesis": {"langauge": "French"}},
            "synthesis.langauge: unknown key; remove it or correct its spelling (did you",
        ),
        (
            {"judge": {"modle": "m"}},
            "judge.modle: unknown key; remove it or correct its spelling (did you mean 'model'?)",
        ),
        (
            {"benchmarks": {"tasks": [{"name": "arc_easy", "shot": 2}]}},
            "benchmarks.tasks.0.shot: unknown key; remove it or correct its spelling (did you mean 'shots'?)",
        ),
        (
            {"benchmarks": {"tasks": [{"name": "arc_easy", "shots": 0}, {"name": "arc_easy", "shots": 5}]}},
            "benchmarks: tasks has arc_easy twice; remove one",
        ),
        (
            {"synthesis": {"request": "papper"}},
            "synthesis.request: give the name of a text ('own', 'paper'), or a text with",
        ),
        (
            {"synthesis": {"request": "Like {demonstration}: {demonstrations}"}},
            "synthesis.request: there is no placeholder {demonstration}; known: {demonstrations}, {language}",
        ),
        (
            {"synthesis": {"completion_prompt": "A list:"}},
            "synthesis.completion_prompt: give the name of a text ('own', 'paper'), or a text with {demonstrations}",
        ),
        ({"synthesis": {"completion_prompt": "paper"}}, "completion_prompt: the paper has no such prompt"),
        (
            {"synthesis": {"request": "paper", "language": "French"}},
            "request: paper (Figure 13) is for English, but language is French; set request: own",
        ),
        ({"seed": "many"}, "seed: Input should be a valid integer"),
        ({"teacher": {}}, "teacher.model: missing"),
        (
            {"influence": {"estimator": "magic"}},
            "influence.estimator: Input should be 'exact', 'first_order', 'linear' or 'screened'",
        ),
        (
            {"influence": {"estimator": "linear", "example_weight": 0.5}},
            "influence: influence.estimator=linear with influence.example_weight=0.5: AdamW's step is nearly linear in the "
            "example's gradient up to about 0.03125; lower influence.example_weight, or set influence.estimator=first_order",
        ),
        ({"influence": {"example_weight": 0.0}}, "influence.example_weight: Input should be greater than 0"),
        (
            {"influence": {"sequential": {}}},
            "influence: influence.sequential belongs to influence.estimator=exact, not screened",
        ),
        (
            {"influence": {"sequential": {}, "estimator": "exact"}, "preferences": {"baseline": "median"}},
            "preferences.baseline: median has no threshold",
        ),
        ({"influence": {"sequential": {}, "estimator": "exact"}}, "preferences.baseline: prompt has no threshold"),
        ({"training": {"batch_size": 3}}, "training: batch_size (3) must be a multiple of micro_batch_size (2)"),
        ({"training": {"schedule": {"warmup": 0.5}}}, "training.schedule: warmup + stable + decay must be 1, not 1.4"),
        (
            {"preferences": {"pairs": "across_prompts"}},
            "preferences: pairs: across_prompts with baseline: prompt; the mean",
        ),
        ({"preferences": {"max_uses": 2}}, "preferences: max_uses: 2 needs pairs: across_prompts"),
        (
            {"teacher_update": {"loss": "robust"}},
            "teacher_update: loss: robust with label_smoothing: 0; loss: robust needs",
        ),
        (
            {"teacher_update": {"label_smoothing": 0.1}},
            "teacher_update: loss: sigmoid with label_smoothing: 0.1; loss: ro",
        ),
        (
            {"teacher_update": {"quantization": "nf4"}},
            "teacher_update: quantization: nf4 without lora; weights in 4 bits",
        ),
        (
            {"teacher_update": {"quantization": "nf4", "lora": {}}, "zero": {"stage": 3}},
            "teacher_update.quantization with zero.stage: 3: DeepSpeed cannot partition",
        ),
        ({"teacher_update": {"label_smoothing": 0.5}}, "teacher_update.label_smoothing: Input should be less than 0.5"),
        ({"teacher_update": {"loss": "simpo"}}, "teacher_update.loss: Input should be 'sigmoid', 'ipo', 'robust' or"),
        (
            {"teacher_update": {"lora": {"rank": 0}}},
            "teacher_update.lora.rank: Input should be greater than or equal to 1",
        ),
        ({"zero": {"stage": 0, "offload": "optimizer"}}, "zero: offload: optimizer needs stage 1, 2 or 3"),
        ({"cluster": {"resources": {"training": {"nodes": 2}}}}, "cluster: resources.training.nodes is 2, but profile"),
        ({"cluster": {"resources": {"training": {"processes_per_node": 3}}}}, "x 3 processes; change them"),
        (
            {"cluster": {"resources": {"teacher_update": {"processes_per_node": 3}}}},
            "teacher_update.batch_size (2) must be a multiple of teacher_update.micro_batch_size (2) x 3 processes",
        ),
        ({"name": "../escape"}, "name: a name has letters"),
        ({"warmup": {"learning_rate": float("inf")}}, "warmup.learning_rate: Input should be a finite number"),
        (
            {"teacher": {"model": [["x"] * 1000] * 1000}},
            "teacher.model: Input should be a valid string; got [['x', ",
        ),
        ({"synthesis": {"seed_demonstrations": 0, "synthetic_demonstrations": 0}}, "at least one demonstration"),
        (
            {"synthesis": {"answers": "endpoint"}},
            "synthesis.answers: endpoint needs a model that answers: set answerer.model",
        ),
        (
            {"answerer": {"model": "a"}},
            "answerer is never asked with synthesis.answers: updated; set synthesis.answers",
        ),
    ],
)
def test_invalid_value_is_refused_with_its_path(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_experiment(MINIMAL | change, "mine.yaml")
    assert message in str(refusal.value)
    assert "mine.yaml" in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("profile: slurm\nslurm: {partiton: gpu}", "slurm.partiton: unknown key"),
        ("polls_seconds: 3\n", "polls_seconds: unknown key.*did you mean 'poll_seconds'"),
    ],
)
def test_cluster_file_mistakes_are_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=rf"cluster.yaml: the cluster file is not valid:\s+{message}"):
        read_cluster(path)


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_experiment({"teacher": {"modle": "x"}, "seed": -1}, "mine.yaml")
    lines = str(refusal.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["seed", "teacher.model", "teacher.modle", "student"]


def test_overrides_reach_nested_fields(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    experiment = read_experiment(path, ("warmup.learning_rate=1e-5", "synthesis.keep_newlines=false", "name=x"))
    assert experiment.warmup.learning_rate == 1e-5
    assert experiment.synthesis.keep_newlines is False
    assert read_experiment(path, ("judge.model=gpt", "student.model='1e5'")).student.model == "1e5"
    resources = read_experiment(path, ("cluster.resources.*.cpus_per_process=9",)).cluster.resources
    assert [stage.cpus_per_process for _, stage in resources] == [9, 9, 9, 9, 9, 1]
    for override, message in (
        ("warmup.learning_rate", "write it as section.key=value"),
        ("teacher.model.x=1", "model is a value, not a section"),
        ("seed=!!int x", "--set seed=!!int x: not valid YAML: not a valid value"),
        ("synthesis.request={persona} asks", "if it is a text, put it in quotes: --set 'synthesis.request=\"...\"'"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_experiment(path, (override,))


def test_override_does_not_change_anchored_sections(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("teacher: {model: t}\nstudent: {model: s}\nwarmup: &same {epochs: 2}\ntraining: *same\n")
    experiment = read_experiment(path, ("training.epochs=3",))
    assert (experiment.warmup.epochs, experiment.training.epochs) == (2, 3)


@pytest.mark.guarantee("code or endless references in YAML")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"teacher: {model: t}\nseed: 1\nseed: 2", r"'seed' occurs twice\s+in .*line 3"),
        (
            b"teacher: {model: t}\nname: !!timestamp 2026-02-30",
            r"not a valid value .*; put text in quotes\s+in .*line 2",
        ),
        (b"seed: 0x" + b"f" * 5000, "not a valid value"),
        (b'name: "\\ud800"', "not a valid value"),
        (b"{a: " * 5000, "nested too deeply"),
        (b"teacher: \xff", "cannot be read .*UTF-8"),
        (b"teacher: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        (b"- teacher", "a configuration is a mapping of sections"),
        (b"", "a configuration is a mapping of sections"),
    ],
)
def test_invalid_yaml_is_refused_with_its_place(text: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=message) as refusal:
        read_experiment(path)
    assert str(path) in str(refusal.value)


WORDS = st.sampled_from(
    [
        *(
            "teacher",
            "student",
            "model",
            "name",
            "seed",
            "warmup",
            "cluster",
            "slurm",
            "extra",
            "experiment",
            "methods",
            "judge",
        ),
        *(
            "1",
            "-1",
            "1e400",
            ".inf",
            ".nan",
            "0x",
            "0b",
            "1:99",
            "2026-02-30",
            "2026-01-01",
            "yes",
            "null",
            "=",
            "<<",
            "~",
        ),
        *("!!int ''", "!!bool x", "!!timestamp x", "!!binary x", "!!set {x}", "!!python/name:os.system", "!!str", "!x"),
        *(
            "&a ",
            "*a",
            "&b [*a, *a]",
            "[*b, *b]",
            '"\\ud800"',
            '"\\0"',
            "? [x]",
            "- ",
            "|",
            ">",
            "'",
            '"',
            "#",
            "%YAML 9",
        ),
    ]
)
YAML = st.recursive(
    WORDS | st.text(max_size=5),
    lambda inner: st.lists(st.tuples(WORDS, inner), max_size=3).map(
        lambda pairs: "{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}"
    ),
    max_leaves=8,
)


@pytest.mark.guarantee("code or endless references in YAML")
@given(st.lists(st.tuples(WORDS, YAML), max_size=5), st.binary(max_size=3), st.tuples(WORDS, YAML))
@example([("experiment", "elsewhere")], b"", ("teacher", "{}"))
def test_any_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]], noise: bytes, override: tuple[str, str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes("\n".join(f"{key}: {value}" for key, value in pairs).encode() + noise)
    change = "=".join(override)
    for read in (
        lambda: read_experiment(path),
        lambda: read_experiment(CONFIGS / "quickstart.yaml", (change,)),
        lambda: read_study(path),
        lambda: read_cluster(path),
    ):
        try:
            read()
        except ConfigError as error:
            refusal = str(error)
        else:
            continue
        assert "any.yaml" in refusal or "quickstart.yaml" in refusal or f"--set {change}" in refusal
        assert len(refusal.encode()) < 10_000


TEXT = st.text(max_size=20) | st.text("ab: '\"\n\r\t\x00\x85\u2028\u2029\ufeff#", max_size=20)
SAMPLING = st.builds(
    Sampling,
    temperature=st.floats(0, exclude_min=True, allow_infinity=False),
    top_p=st.floats(0, 1, exclude_min=True),
    presence_penalty=st.floats(-2, 2),
    max_tokens=st.integers(1),
)
FILTERS = st.lists(
    st.sampled_from(["length", "words", "script"])
    | st.builds(OwnFilter, name=st.just("m:F"), settings=st.dictionaries(TEXT, TEXT))
).map(tuple)
EXPERIMENTS = st.builds(
    Experiment,
    name=st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9_-]{0,79}\Z"),
    seed=st.integers(0, 2**31 - 1),
    teacher=st.builds(Teacher, model=TEXT, revision=st.none() | TEXT),
    student=st.builds(Student, model=TEXT, max_length=st.integers(32)),
    seed_pool=st.builds(DataSource, path=TEXT, split=TEXT, limit=st.none() | st.integers(1), input_field=TEXT),
    synthesis=st.builds(
        Synthesis,
        instruction=SAMPLING,
        oversampling=st.floats(1, allow_infinity=False),
        separator=TEXT,
        filters=FILTERS,
    ),
    judge=st.builds(Endpoint, model=TEXT, base_url=TEXT.map("https://{}".format), key_variable=st.just("KEY")),
    benchmarks=st.builds(Benchmarks, mt_bench=st.none() | TEXT, task_folder=st.none() | TEXT, answers=SAMPLING),
    cluster=st.builds(
        Cluster,
        slurm=st.builds(
            Slurm,
            setup=st.lists(TEXT, max_size=3).map(tuple),
            extra=st.dictionaries(TEXT.map("own-{}".format), TEXT | st.integers() | st.booleans(), max_size=3),
        ),
        poll_seconds=st.floats(0, exclude_min=True, allow_infinity=False),
    ),
)


@given(EXPERIMENTS)
def test_valid_configuration_survives_round_trip(
    tmp_path_factory: pytest.TempPathFactory, experiment: Experiment
) -> None:
    path = tmp_path_factory.getbasetemp() / "written.yaml"
    write_yaml(experiment, path)
    again = read_experiment(path)
    assert again == experiment
    assert again.identity() == experiment.identity()


def test_method_settings_exclude_resources_and_name() -> None:
    plain = parse_experiment(MINIMAL, "a")
    moved = parse_experiment(
        MINIMAL | {"name": "other", "iterations": 3, "cluster": {"resources": {"influence": {"parallel_jobs": 9}}}}, "b"
    )
    assert plain.identity() == moved.identity()
    offloaded = parse_experiment(MINIMAL | {"zero": {"offload": "optimizer"}}, "b")
    assert plain.identity() == offloaded.identity()
    changed = parse_experiment(MINIMAL | {"warmup": {"examples": 7}}, "c")
    assert differences(plain.identity(), changed.identity()) == ["warmup.examples: 1000 -> 7"]


def test_example_weight_defaults_to_training_batch() -> None:
    """The presets of the paper have 1/8, like the authors' code on 8 GPUs."""
    option = inspect.signature(influence).parameters["example_weight"]
    assert Influence().example_weight == option.default == 1 / Training().batch_size
    for name in ("paper-8b", "paper-1b"):
        assert read_experiment(CONFIGS / f"{name}.yaml").influence.example_weight == 1 / 8


def test_influence_settings_are_complete() -> None:
    experiment = parse_experiment(MINIMAL | {"influence": {"example_weight": 0.125}}, "mine.yaml")
    settings = influence_settings(experiment, "exact", {"beta2": 0.95})
    assert settings.step.example_weight == 0.125
    assert settings.step.learning_rate == experiment.warmup.learning_rate
    assert (settings.step.beta1, settings.step.beta2) == (experiment.warmup.beta1, 0.95)
    decisive = settings.model_dump().keys() | settings.step.model_dump().keys()
    sizes = {"probing_examples", "later_probing_examples", "examples_per_shard"}
    assert Influence.model_fields.keys() - decisive == {"screening", *sizes}


def test_teacher_update_defaults_to_training_resources() -> None:
    training = {"processes_per_node": 8, "gpus_per_node": 8}
    assert parse(Cluster, {"resources": {"training": training}}, "a").resources.teacher_update.gpus_per_node == 8
    both = {"training": training, "teacher_update": {"processes_per_node": 2}}
    assert parse(Cluster, {"resources": both}, "a").resources.teacher_update == Resources(processes_per_node=2)


@pytest.mark.parametrize("name", ["paper-8b", "paper-1b"])
def test_paper_presets_have_table_4_teacher_update(name: str) -> None:
    experiment = read_experiment(CONFIGS / f"{name}.yaml")
    recipe, resources = experiment.teacher_update, experiment.cluster.resources.teacher_update
    assert (recipe.batch_size, recipe.learning_rate, recipe.beta, recipe.epochs) == (2, 1e-6, 0.1, 1)
    assert resources.nodes * resources.processes_per_node == resources.gpus_per_node == 2
    shared = read_cluster(CONFIGS / "clusters" / "slurm.yaml")
    parse_experiment(experiment.model_dump(mode="json") | {"cluster": shared.model_dump(mode="json")}, name)


def test_preset_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart").mkdir()  # a folder, not a configuration
    assert read_experiment(Path("quickstart")) == read_experiment(CONFIGS / "quickstart.yaml")
    assert read_study(Path("quickstart")) == read_study(CONFIGS / "studies" / "quickstart.yaml")
    assert read_cluster(Path("slurm")) == read_cluster(CONFIGS / "clusters" / "slurm.yaml")
    assert read_cluster(Path("slurm")).profile == "slurm"


def test_file_takes_precedence_over_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("paper-8b").write_text("{name: mine, teacher: {model: t}, student: {model: s}}")
    Path("study.yaml").write_text("experiment: paper-8b")
    assert read_experiment(Path("paper-8b")).name == "mine"
    assert read_study(Path("study.yaml")).experiment.name == "mine"
    Path("paper-8b").unlink()
    assert read_study(Path("study.yaml")).experiment.name == "paper-8b"


@pytest.mark.parametrize(
    ("read", "presets"),
    [
        (read_experiment, "evaluation, paper-1b, paper-8b, quickstart"),
        (read_study, "laptop, quickstart"),
        (read_cluster, "slurm, workstation"),
    ],
)
def test_unknown_preset_lists_the_shipped_ones(read: Callable[[Path], object], presets: str) -> None:
    with pytest.raises(ConfigError, match=rf"quikstart: no such file, and no preset .*: {presets} \(files in"):
        read(Path("quikstart"))
