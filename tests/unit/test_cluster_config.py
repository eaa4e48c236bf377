"""YAML 1.2, and the settings of clusters: times and GPU types as Slurm reads them, no option twice."""

import math
import re
from typing import Any

import pytest

from cluster.backends.slurm import gpu_options
from montessori_core.config import (
    Cluster,
    Resources,
    Slurm,
    StageResources,
    parse,
    parse_experiment,
    parse_yaml,
    read_yaml,
)
from montessori_core.config.slurm import JobOptions
from montessori_core.errors import ConfigError
from support import CONFIGS, ROOT


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(
            (text, text)
            for text in ("12:00:00", "1:30", "1:30.5", "yes", "No", "on", "OFF", "y", "2026-02-30", "1_000", "0b1")
        ),
        *((text, text) for text in ("0o9", "1e", "e5", ".", "=", "+.nan", "tRue", "1.2.3", "-.e1")),
        *(("010", 10), ("-7", -7), ("+7", 7), ("0o10", 8), ("0x1F", 31), ("1e-5", 1e-5), ("1.", 1.0), (".5", 0.5)),
        *(
            ("1e5", 1e5),
            ("true", True),
            ("FALSE", False),
            ("~", None),
            ("null", None),
            ("", None),
            ("-.inf", -math.inf),
        ),
        *(("'1e5'", "1e5"), ('"12:00"', "12:00")),
    ],
)
def test_yaml_is_read_as_version_1_2(text: str, value: object) -> None:
    parsed = parse_yaml(f"key: {text}", "test")["key"]
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        *(
            ("720", 720),
            ("12:00:00", 720),
            ("90:00", 90),
            ("0:30", 1),
            ("1-12", 2160),
            ("2-00:30", 2910),
            ("1-0:0:1", 1441),
        ),
        *(("'45'", 45), ("00:00:01", 1), ("100:00:00", 6000)),
    ],
)
def test_time_limit_is_read_as_sbatch_reads_it(text: str, minutes: int) -> None:
    content = parse_yaml(f"resources: {{training: {{time_limit_minutes: {text}}}}}", "test")
    assert parse(Cluster, content, "test").resources.training.time_limit_minutes == minutes


@pytest.mark.parametrize("text", ["0:00", "1:2:3:4", "12h", "-5", "1-", "12:", "UNLIMITED", "1.5"])
def test_other_time_limit_is_refused(text: str) -> None:
    content = parse_yaml(f"resources: {{training: {{time_limit_minutes: '{text}'}}}}", "test")
    with pytest.raises(ConfigError, match="resources.training.time_limit_minutes: Input should be"):
        parse(Cluster, content, "test")


@pytest.mark.parametrize("stage", ["training", "teacher_update"])
def test_training_without_gpu_for_each_process_is_refused(stage: str) -> None:
    """NCCL refuses two processes on a GPU, after the job has waited in the queue."""
    for resources in ({"processes_per_node": 4}, {"processes_per_node": 4, "gpus_per_node": 4}):
        parse(Cluster, {"resources": {stage: resources}}, "test")
    with pytest.raises(
        ConfigError, match=rf"{stage}.processes_per_node \(4\) is more than {stage}.gpus_per_node \(2\).*; set"
    ):
        parse(Cluster, {"resources": {stage: {"processes_per_node": 4, "gpus_per_node": 2}}}, "test")


@pytest.mark.parametrize("stage", ["generation", "influence", "evaluation", "judging"])
def test_idle_processes_are_refused(stage: str) -> None:
    """One process computes the rows of a job; others would hold GPUs and wait."""
    for change in ({"processes_per_node": 8, "gpus_per_node": 8}, {"nodes": 2}):
        resources = StageResources.model_validate({stage: change})
        with pytest.raises(
            ConfigError, match=rf"resources.{stage}: nodes is . and processes_per_node ., but one process computes"
        ):
            resources.refuse_idle_processes()
        resources.refuse_idle_processes(unused=[stage])


GPUS, MEMORY = {"training": {"gpus_per_node": 4}}, {"training": {"memory_gb": 8}}


@pytest.mark.parametrize(
    ("extra", "resources", "setting"),
    [
        ({"gpus-per-node": "h100:4"}, {}, "cluster.resources.*.gpus_per_node and gpu_type"),
        ({"gpus_per_node": "h100:4"}, GPUS, "cluster.resources.*.gpus_per_node and gpu_type"),
        ({"--gres": "gpu:h100:4"}, GPUS, "cluster.resources.*.gpus_per_node and gpu_type"),
        ({"gpus": 4}, GPUS, "cluster.resources.*.gpus_per_node and gpu_type"),
        ({"mem-per-cpu": "4G"}, MEMORY, "cluster.resources.*.memory_gb"),
        ({"mem": "4G"}, {}, "cluster.resources.*.memory_gb"),
        ({"time": "1:00:00"}, {}, "cluster.resources.*.time_limit_minutes"),
        ({"partition": "gpu"}, {}, "cluster.slurm.partition"),
        ({"ntasks": 2}, {}, "cluster.resources.*.processes_per_node"),
        ({"array": "0-3"}, {}, "cluster.resources.*.parallel_jobs and shards_per_job"),
    ],
)
def test_extra_option_of_a_setting_is_refused(
    extra: dict[str, object], resources: dict[str, object], setting: str
) -> None:
    with pytest.raises(
        ConfigError,
        match=re.escape(f"slurm.extra: {next(iter(extra)).lstrip('-').replace('_', '-')}: sbatch would get"),
    ) as refusal:
        parse(Cluster, {"slurm": {"extra": extra}, "resources": resources}, "test")
    assert f"set {setting}" in str(refusal.value)


@pytest.mark.parametrize(
    ("extra", "resources"),
    [
        ({"gres": "nvme:1", "reservation": "night", "requeue": False, "wckey": "w"}, GPUS),
        ({"gres": "gpu:2"}, MEMORY),
        ({"mem-per-cpu": "4G", "begin": "16:00"}, GPUS),
    ],
)
def test_other_extra_options_are_accepted(extra: dict[str, object], resources: dict[str, object]) -> None:
    assert parse(Cluster, {"slurm": {"extra": extra}, "resources": resources}, "test").slurm.extra == extra


@pytest.mark.parametrize(
    ("option", "count", "kind", "expected"),
    [
        (None, 4, "h100", {"gpus-per-node": "h100:4"}),
        ("gpus-per-node", 4, None, {"gpus-per-node": "4"}),
        ("gres", 4, "h100", {"gres": "gpu:h100:4"}),
        ("gres", 4, None, {"gres": "gpu:4"}),
        ("gres", 0, "h100", {}),
    ],
)
def test_gpu_options_name_type_and_count(option: Any, count: int, kind: str | None, expected: dict[str, str]) -> None:
    assert gpu_options(Slurm(gpu_option=option), Resources(gpus_per_node=count, gpu_type=kind)) == expected


def test_stage_options_replace_common_ones() -> None:
    slurm = Slurm(
        partition="gpu",
        account="project",
        exclusive=True,
        setup=("module load cuda",),
        environment={"A": "1", "B": "1"},
        extra={"reservation": "night", "nice": 5},
        stages={
            "judging": JobOptions(
                partition="cpu",
                exclusive=False,
                environment={"B": "it's"},
                extra={"reservation": False, "licenses": "api"},
            )
        },
    )
    assert slurm.of_stage("training") == slurm.of_stage("") == slurm
    judging = slurm.of_stage("judging")
    assert (judging.partition, judging.account, judging.exclusive) == ("cpu", "project", False)
    assert judging.commands == ["export A=1", """export B='it'"'"'s'""", "module load cuda"]
    assert judging.extra == {"reservation": False, "nice": 5, "licenses": "api"}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"judge": {"partition": "cpu"}}, "slurm.stages.judge"),
        (
            {"judging": {"partitoin": "cpu"}},
            "judging.partitoin: unknown key; remove it or correct its spelling (did you mean",
        ),
        ({"judging": {"environment": {"A B": "1"}}}, "slurm.stages.judging.environment.A B"),
        ({"training": {"extra": {"gres": "gpu:1"}}}, "slurm.stages.training.extra: gres: sbatch would get"),
        ({"judging": {"extra": {"exclusive": True}}}, "remove it, and set cluster.slurm.exclusive"),
    ],
)
def test_bad_options_of_a_stage_are_refused(stages: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(Cluster, {"slurm": {"stages": stages}, "resources": GPUS}, "test")


def test_stage_without_gpus_may_set_gres() -> None:
    content = {"slurm": {"stages": {"judging": {"extra": {"gres": "gpu:1"}}}}, "resources": GPUS}
    assert parse(Cluster, content, "test").slurm.of_stage("judging").extra == {"gres": "gpu:1"}


@pytest.mark.parametrize("preset", ["paper-1b", "paper-8b"])
def test_documented_clusters_fit_the_paper_presets(preset: str) -> None:
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    blocks = [parse_yaml(block, "docs/cluster.md") for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    clusters = [block["cluster"] for block in blocks if "training" in block.get("cluster", {}).get("resources", {})]
    assert [cluster["profile"] for cluster in clusters] == ["slurm", "allocation"]
    for cluster in clusters:
        resources = parse_experiment(
            read_yaml(CONFIGS / f"{preset}.yaml") | {"cluster": cluster}, preset
        ).cluster.resources
        assert resources.evaluation.gpus_per_node
