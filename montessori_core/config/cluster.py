"""Where jobs run and which resources they get."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from montessori_core.config.resources import StageResources
from montessori_core.config.section import Count, Section, parse
from montessori_core.config.slurm import Slurm
from montessori_core.config.yaml import read_yaml
from montessori_core.presets import find_configuration


class Vllm(Section):
    """How vLLM uses the GPUs of a generation job. Results do not depend on it, except for rounding."""

    memory_share: float | None = Field(
        None, gt=0.0, le=1.0, description="Share of a GPU's memory that vLLM takes. If not set, vLLM's default."
    )
    max_model_len: Count | None = Field(
        None,
        description="Longest prompt with its continuation, tokens; vLLM's cache must hold at least one of that length. If "
        "not set, the next power of two above the job's prompts and max_tokens, at most the model's positions. If shorter "
        "than a prompt and max_tokens, it cuts outputs.",
    )
    tensor_parallel: Count | None = Field(
        None,
        description="GPUs that share a copy of the model; must divide its attention heads. If not set, as few as hold the "
        "weights with room for a cache.",
    )
    data_parallel: Count | None = Field(
        None,
        description="Copies of the model in a job, each on tensor_parallel GPUs. If not set, as many as the GPUs allow.",
    )


class Cluster(Section):
    """Where jobs run and which resources they get. Changing these settings recomputes nothing."""

    profile: Literal["local", "slurm", "allocation"] = Field(
        "local",
        description="'local' runs jobs as processes on this machine; 'slurm' submits them with sbatch; 'allocation' runs "
        "them with srun on the nodes of the allocation (salloc, sbatch) in which the driver runs.",
    )
    resources: StageResources = Field(StageResources(), description="Resources by stage.")
    slurm: Slurm = Field(
        Slurm(),
        description="Slurm options; ignored by the local profile. The allocation profile uses `python`, `setup`, "
        "`environment`, `container`, `gpu_option` and `srun`, of all stages or of one.",
    )
    generation_python: str | None = Field(
        None,
        description="Python of a separate environment for generation jobs (vLLM pins its own torch). If not set, the same as "
        "for all other jobs.",
    )
    vllm: Vllm = Field(Vllm(), description="How vLLM uses the GPUs of a generation job.")
    poll_seconds: float = Field(0.5, gt=0.0, description="Time between two polls of the jobs, seconds.")

    @model_validator(mode="after")
    def _extra_repeats_no_setting(self) -> "Cluster":
        self.slurm.refuse_repeated_options(dict(self.resources))
        return self

    @model_validator(mode="after")
    def _local_is_one_node(self) -> "Cluster":
        if self.profile == "local":
            for stage, resources in self.resources:
                if resources.nodes > 1:
                    raise ValueError(
                        f"resources.{stage}.nodes is {resources.nodes}, but profile: local has one node; set nodes: 1 "
                        "or profile: slurm"
                    )
        return self


def read_cluster(path: Path) -> Cluster:
    """Read a cluster file: the `cluster` section of an experiment, with or without the key `cluster`.

    `path` may be the name of a preset.

    Raises:
        ConfigError: the file is missing, is not YAML, or is not valid.
    """
    path = find_configuration(path, "clusters")
    content = read_yaml(path)
    return parse(Cluster, content.get("cluster", content), f"{path}: the cluster file")
