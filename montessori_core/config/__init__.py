"""The configuration of an experiment: frozen pydantic models with a description per field.

The descriptions, with units, become docs/configuration.md and the form in Prefect's UI. Defaults follow the paper
(Montessori-Instruct, ICLR 2025, Section 4 and Appendix A) unless the description says otherwise.
"""

from montessori_core.config.cluster import Cluster, Vllm, read_cluster
from montessori_core.config.data import DataFormat, DataSource
from montessori_core.config.evaluation import Benchmarks, Comparison
from montessori_core.config.experiment import (
    Experiment,
    Used,
    parse_experiment,
    read_experiment,
    used_of_model,
    without_other_revision,
)
from montessori_core.config.filters import (
    CodeRunsFilter,
    FilterSettings,
    JudgeFilter,
    LanguageFilter,
    OwnFilter,
    RougeFilter,
    SemanticFilter,
)
from montessori_core.config.influence import (
    Baseline,
    Dtype,
    Influence,
    Preferences,
    Screening,
    Sequential,
    StateDtype,
    WeightPer,
)
from montessori_core.config.models import Endpoint, Lora, Student, Teacher
from montessori_core.config.resources import Resources, StageResources
from montessori_core.config.section import RUN_NAME, FolderName, Section, differences, parse
from montessori_core.config.slurm import HeldJobs, Slurm
from montessori_core.config.strategies import (
    EvolveStrategy,
    GroundedStrategy,
    MagpieStrategy,
    OwnStrategy,
    SelfInstructStrategy,
)
from montessori_core.config.study import Study, read_study
from montessori_core.config.synthesis import Sampling, Synthesis
from montessori_core.config.tailor import Tailored
from montessori_core.config.training import Optimization, Schedule, TeacherUpdate, Training, Warmup, Zero
from montessori_core.config.yaml import dump_yaml, parse_yaml, read_yaml, write_yaml

__all__ = [
    "RUN_NAME",
    "Baseline",
    "Benchmarks",
    "Cluster",
    "CodeRunsFilter",
    "Comparison",
    "DataFormat",
    "DataSource",
    "Dtype",
    "Endpoint",
    "EvolveStrategy",
    "Experiment",
    "FilterSettings",
    "FolderName",
    "GroundedStrategy",
    "HeldJobs",
    "Influence",
    "JudgeFilter",
    "LanguageFilter",
    "Lora",
    "MagpieStrategy",
    "Optimization",
    "OwnFilter",
    "OwnStrategy",
    "Preferences",
    "Resources",
    "RougeFilter",
    "Sampling",
    "Schedule",
    "Screening",
    "Section",
    "SelfInstructStrategy",
    "SemanticFilter",
    "Sequential",
    "Slurm",
    "StageResources",
    "StateDtype",
    "Student",
    "Study",
    "Synthesis",
    "Tailored",
    "Teacher",
    "TeacherUpdate",
    "Training",
    "Used",
    "Vllm",
    "Warmup",
    "WeightPer",
    "Zero",
    "differences",
    "dump_yaml",
    "parse",
    "parse_experiment",
    "parse_yaml",
    "read_cluster",
    "read_experiment",
    "read_study",
    "read_yaml",
    "used_of_model",
    "without_other_revision",
    "write_yaml",
]
