"""Configuration: strict, described, and the same after a round trip."""

from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

from montessori_core.config import Experiment, differences, parse_experiment, read_cluster, read_experiment, to_yaml
from montessori_core.errors import ConfigError

ROOT = Path(__file__).parent.parent
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


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configuration_survives_a_round_trip(path: Path) -> None:
    experiment = read_experiment(path)
    assert parse_experiment(yaml.safe_load(to_yaml(experiment)), "round trip") == experiment


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"warmpu": {}}, "warmpu: unknown key; remove it or correct its spelling (did you mean 'warmup'?)"),
        ({"synthesis": {"filters": {"max_rouge": 0.5}}}, "synthesis.filters.max_rouge: unknown key"),
        ({"seed": "many"}, "seed: Input should be a valid integer"),
        ({"teacher": {}}, "teacher.model: missing"),
        (
            {"influence": {"estimator": "magic"}},
            "influence.estimator: Input should be 'exact', 'first_order' or 'screened'",
        ),
        (
            {"influence": {"sequential": {}}},
            "influence: sequential evaluation belongs to estimator: exact, not screened",
        ),
        (
            {"influence": {"sequential": {}, "estimator": "exact"}, "preferences": {"baseline": "median"}},
            "preferences.baseline: median has no threshold",
        ),
        ({"training": {"batch_size": 3}}, "training: batch_size (3) must be a multiple of micro_batch_size (2)"),
        ({"training": {"schedule": {"warmup": 0.5}}}, "training.schedule: warmup + stable + decay must be 1, not 1.4"),
        ({"zero": {"stage": 0, "offload": "optimizer"}}, "zero: offload: optimizer needs stage 1, 2 or 3"),
        ({"cluster": {"resources": {"training": {"nodes": 2}}}}, "cluster: resources.training.nodes is 2, but profile"),
        ({"cluster": {"resources": {"training": {"processes_per_node": 3}}}}, "x 3 training processes"),
        ({"name": "../escape"}, "name: String should match pattern"),
        ({"synthesis": {"seed_demonstrations": 0, "synthetic_demonstrations": 0}}, "at least one demonstration"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_path(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_experiment(MINIMAL | change, "mine.yaml")
    assert message in str(refusal.value)
    assert "mine.yaml" in str(refusal.value)


def test_shipped_cluster_file_fits_and_mistakes_in_one_are_named(tmp_path: Path) -> None:
    assert read_cluster(ROOT / "configs" / "clusters" / "slurm.yaml").profile == "slurm"
    path = tmp_path / "cluster.yaml"
    path.write_text("profile: slurm\nslurm: {partiton: gpu}")
    with pytest.raises(
        ConfigError, match=r"cluster.yaml: the cluster file does not fit:\s+slurm.partiton: unknown key"
    ):
        read_cluster(path)


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_experiment({"teacher": {"modle": "x"}, "seed": -1}, "mine.yaml")
    lines = str(refusal.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["seed", "teacher.model", "teacher.modle", "student"]


def test_overrides_reach_nested_fields(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    experiment = read_experiment(path, ("warmup.learning_rate=1e-5", "synthesis.filters.keep_newlines=false", "name=x"))
    assert experiment.warmup.learning_rate == 1e-5
    assert experiment.synthesis.filters.keep_newlines is False
    with pytest.raises(ConfigError, match="write it as section.key=value"):
        read_experiment(path, ("warmup.learning_rate",))


def test_resources_and_name_are_not_part_of_the_method() -> None:
    plain = parse_experiment(MINIMAL, "a")
    moved = parse_experiment(
        MINIMAL | {"name": "other", "iterations": 3, "cluster": {"resources": {"influence": {"parallel_jobs": 9}}}}, "b"
    )
    assert plain.method() == moved.method()
    changed = parse_experiment(MINIMAL | {"warmup": {"examples": 7}}, "c")
    assert differences(plain.method(), changed.method()) == ["warmup.examples: 1000 -> 7"]
