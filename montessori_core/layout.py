"""Names of the files and folders that a run consists of.

    RUN/
      config.yaml              every setting, defaults spelled out
      provenance.json          versions, machine, and what the run was started from
      models.json              commits of models of the Hugging Face hub
      driver.lock              the process that drives the run
      report.html
      sources/                 copies of the human-written sets, and of the files of benchmarks
      untrained/               held-out loss of the untrained student
      unmodified/              the unmodified teacher: training/, student/, training-influence.parquet
      iteration-1/
        instructions.parquet   the probing set: what the teacher wrote, and why instructions were rejected
        examples.parquet       the probing set: accepted instructions and their responses
        influence.parquet      influence of the probing set
        preferences.parquet    preference pairs
        metrics.json           written last: the iteration is finished
        training/              training set of the updated teacher: instructions.parquet, examples.parquet
        training-influence.parquet
        warmup/ teacher/ student/   trainings

Folders of stages are described in `cluster.stage`.
"""

import re
from pathlib import Path

CONFIG = "config.yaml"
PROVENANCE = "provenance.json"
MODEL_COMMITS = "models.json"
DRIVER_LOCK = "driver.lock"
REPORT = "report.html"
SOURCES = "sources"
UNTRAINED = "untrained"
UNMODIFIED = "unmodified"

INSTRUCTIONS = "instructions.parquet"
EXAMPLES = "examples.parquet"
INFLUENCE = "influence.parquet"
TRAINING_INFLUENCE = "training-influence.parquet"
PREFERENCES = "preferences.parquet"
UTILITY = "utility.parquet"
METRICS = "metrics.json"

# In the folder of a trained model.
LOG_FILE = "training_log.json"  # one entry an optimizer step
COUNTS_FILE = "training_counts.json"  # how many examples could be used
MOMENTS_FILE = "adamw.safetensors"  # AdamW's moments, per parameter
KEPT = "kept"  # folder of models on the way, one a folder step-N


def iteration(number: int) -> str:
    """Name of an iteration's folder; iterations count from 1."""
    return f"iteration-{number}"


def iterations(run: Path) -> dict[int, Path]:
    """Folders of the iterations that a run has begun, by number."""
    folders = {
        int(name[1]): path
        for path in run.glob("iteration-*")
        if (name := re.fullmatch(r"iteration-(\d+)", path.name)) and path.is_dir()
    }
    return dict(sorted(folders.items()))
