"""Names of the files and folders of a run.

    RUN/
      config.yaml              every setting, including defaults
      opened.yaml              the same, to find what is edited in config.yaml later
      provenance.json          versions, machine and input models
      models.json              commits of models of the Hugging Face hub
      data_sets.json           licence, where one is stated, and commit on the hub of each set in sources/
      schedule.json            iterations of the flow runs that a schedule of Prefect started
      approval.json            the run needs approval of its preference pairs, however it is resumed
      driver.lock              who drives the run: a process, or a Slurm job
      driver.sh, driver.log    script and log of drivers that run as Slurm jobs; prefect.db is
                               the database of their temporary Prefect servers
      held/                    scripts and logs of the Slurm jobs that the driver holds (cluster.slurm.hold)
      report.html
      sources/                 copies of the human-written sets, the benchmark files and configured chat templates;
                               bad_rows.jsonl lists rows that were left out of the sets; passages.jsonl has the
                               passages of documents
      exports/                 data for other trainers, written by montessori export
      tracking/                ids and event files of experiment trackers
      models/                  teacher and student with configured chat templates: links to their files
      untrained/               held-out loss of the untrained student
      unmodified/              the unmodified teacher: training/, student/, training-influence.parquet
      iteration-1/
        instructions.parquet   the probing set: all generated instructions, and why each rejected one was rejected
        examples.parquet       the probing set: accepted instructions and their responses
        influence.parquet      influence of the probing set
        preferences.parquet    preference pairs
        approval.md            preference pairs that wait for approval, to be read by a person
        approved.json          hash of the approved preference pairs
        metrics.json           written last, when the iteration is finished
        training/              training set of the updated teacher: instructions.parquet, examples.parquet
        training-influence.parquet
        warmup/ teacher/ student/   training runs

`cluster.stage` describes the folders of stages.
"""

import re
from pathlib import Path

CONFIG = "config.yaml"
OPENED = "opened.yaml"
PROVENANCE = "provenance.json"
MODEL_COMMITS = "models.json"
ORIGINS = "data_sets.json"
SCHEDULE = "schedule.json"
APPROVAL = "approval.json"
DRIVER_LOCK = "driver.lock"
DRIVER_SCRIPT = "driver.sh"
DRIVER_LOG = "driver.log"
HELD = "held"
REPORT = "report.html"
SOURCES = "sources"
MODELS = "models"
METHODS = "methods"  # of a seed of a study: a folder for each method
EXPORTS = "exports"
TRACKING = "tracking"
UNTRAINED = "untrained"
UNMODIFIED = "unmodified"

INSTRUCTIONS = "instructions.parquet"
EXAMPLES = "examples.parquet"
INFLUENCE = "influence.parquet"
TRAINING_INFLUENCE = "training-influence.parquet"
PREFERENCES = "preferences.parquet"
UTILITY = "utility.parquet"
METRICS = "metrics.json"

CHECKPOINT_FOLDER = "checkpoints"  # in the folder of a training that is not finished

# In the folder of a trained model.
LOG_FILE = "training_log.json"  # one entry per optimizer step
COUNTS_FILE = "training_counts.json"  # numbers of usable examples
MOMENTS_FILE = "adamw.safetensors"  # AdamW's moments, per parameter
KEPT = "kept"  # folder of intermediate models, each in a folder step-N


def iteration(number: int) -> str:
    """Return the name of an iteration's folder; iterations count from 1."""
    return f"iteration-{number}"


def iterations(run: Path) -> dict[int, Path]:
    """Return the folders of the iterations that a run has started, by number."""
    folders = {
        int(name[1]): path
        for path in run.glob("iteration-*")
        if (name := re.fullmatch(r"iteration-(\d+)", path.name)) and path.is_dir()
    }
    return dict(sorted(folders.items()))
