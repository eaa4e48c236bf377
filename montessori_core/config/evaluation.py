"""How students are evaluated, and what is computed for comparison."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from montessori_core.config.section import Count, Section
from montessori_core.config.synthesis import Sampling
from montessori_core.errors import ConfigError
from montessori_core.formatting import task_name


class Comparison(Section):
    """Additional results that show the effect of the method."""

    unmodified_teacher: bool = Field(
        True,
        description="Also train a student on the same number of examples from the unmodified teacher. A study has its own "
        "comparisons.",
    )
    influence_examples: int = Field(
        256,
        ge=0,
        description="Number of training examples of each teacher, updated and unmodified (in a study: of montessori and the "
        "baseline), whose influence is measured (Figures 3c and 3d); 0 is off.",
    )
    teacher_checkpoints: int = Field(
        0,
        ge=0,
        description="Number of checkpoints kept during each teacher update, evenly spaced. A student is trained on the data "
        "of each (Figures 3a and 3b); 0 is off.",
    )


class HarnessTask(Section):
    """A task of lm-evaluation-harness."""

    name: str = Field(description="Name of a task, tag or group; 'lm_eval ls tasks' lists them.")
    shots: int | None = Field(
        None,
        ge=0,
        description="Demonstrations before each item. If not set, the task's default. Tasks whose file has 0 have a fixed "
        "prompt, for which shots are refused (in a group, ignored).",
    )
    limit: Count | None = Field(
        None,
        description="Use only the first items of each task, at most this many, for a trial. If not set, all items.",
    )


class Benchmarks(Section):
    """Benchmarks of the students, in addition to the held-out loss (Section 4, Evaluation Methods)."""

    tasks: tuple[HarnessTask, ...] = Field((), description="Tasks of lm-evaluation-harness.")
    task_folder: str | None = Field(
        None, description="Folder with custom task files (YAML) and their data. Paths of data files are relative to it."
    )
    chat_template: bool = Field(False, description="Apply the student's chat template to the prompts of these tasks.")
    batch_size: Count = Field(16, description="Requests of these tasks per forward pass.")
    items_per_shard: Count = Field(500, description="Maximum number of items of these tasks per shard.")
    alpaca_eval: str | None = Field(
        None,
        description="AlpacaEval: file (.json or .jsonl) with instruction and output, the answers to compare the student's "
        "with, e.g. the gpt4_turbo outputs of AlpacaEval 2.0. Students are also compared with each other on it.",
    )
    alpaca_eval_difficulty: str | None = Field(
        None,
        description="AlpacaEval's instruction_difficulty.csv, for the length-controlled win rate. If not set, the regression "
        "has no difficulty term.",
    )
    mt_bench: str | None = Field(None, description="MT-Bench: file of questions (.jsonl).")
    mt_bench_references: str | None = Field(
        None, description="MT-Bench: file of reference answers (.jsonl) to the math, coding and reasoning questions."
    )
    mt_bench_temperature: float | None = Field(
        None,
        ge=0.0,
        description="MT-Bench: temperature for all questions. If not set, FastChat's for each category: 0.7 for writing and "
        "roleplay, 0.1 for stem and humanities, 0 for extraction, math, coding and reasoning, 0.7 for others.",
    )
    judge_prompts: Literal["own", "published"] = Field(
        "own",
        description="Prompts for the judge. 'own': those of this project, whose verdict is the last line of the answer. "
        "'published': AlpacaEval's (the probability of one token) and FastChat's ([[rating]]). The names of the scores say "
        "which.",
    )
    answers: Sampling = Field(
        Sampling(temperature=0.7, top_p=1.0, presence_penalty=0.0),
        description="Decoding of the students' answers that are judged. For MT-Bench, see mt_bench_temperature.",
    )
    contamination_words: int = Field(
        8,
        ge=0,
        description="Count an item as seen if this many consecutive words of it occur in the training data; 0 is off.",
    )

    @model_validator(mode="after")
    def _task_names_differ(self) -> "Benchmarks":
        if twice := _first_twice([task.name for task in self.tasks]):
            raise ValueError(f"tasks has {twice} twice; remove one")
        return self

    def refuse_equal_files(self) -> None:
        """Refuse two files of tasks with one name, which tables and reports show without their folders.

        When scores are first asked for, not when a configuration is read: folders of earlier versions may have such files.

        Raises:
            ConfigError: there are two.
        """
        if twice := _first_twice([task_name(task.name) for task in self.tasks]):
            raise ConfigError(f"benchmarks.tasks: two tasks are called {twice}; rename one of the files")

    @property
    def judged(self) -> bool:
        """Whether a benchmark needs a judge."""
        return self.alpaca_eval is not None or self.mt_bench is not None


def _first_twice(names: Sequence[str]) -> str | None:
    return next((name for name in names if names.count(name) > 1), None)
