"""What students are measured by, and what is computed for comparison."""

from typing import Literal

from pydantic import Field

from montessori_core.config.section import Count, Section
from montessori_core.config.synthesis import Sampling


class Comparison(Section):
    """What is computed beside the method, to see what it changed."""

    unmodified_teacher: bool = Field(
        True, description="Also train a student on as many examples of the unmodified teacher."
    )
    influence_examples: int = Field(
        256,
        ge=0,
        description="Training examples of the updated and of the unmodified teacher whose influence is measured (Figure "
        "3d); 0 is off.",
    )
    teacher_checkpoints: int = Field(
        0,
        ge=0,
        description="Teachers kept on the way through each update, evenly spread; a student is trained on the data of each "
        "(Figures 3a and 3b). 0 is off.",
    )


class HarnessTask(Section):
    """A task of lm-evaluation-harness."""

    name: str = Field(description="Name of a task, tag or group: 'lm_eval ls tasks' lists them.")
    shots: int | None = Field(
        None, ge=0, description="Demonstrations before each item; none takes the task's own number."
    )
    limit: Count | None = Field(None, description="Only so many first items of each task, for a trial; none takes all.")


class Benchmarks(Section):
    """What students are measured by beside the held-out loss (Section 4.2)."""

    tasks: tuple[HarnessTask, ...] = Field((), description="Tasks of lm-evaluation-harness.")
    task_folder: str | None = Field(
        None,
        description="Folder with task files (YAML) of your own, and their data: they name data files from this folder.",
    )
    chat_template: bool = Field(False, description="Put the prompts of these tasks in the student's chat template.")
    batch_size: Count = Field(16, description="Requests of these tasks in one forward pass.")
    items_per_shard: Count = Field(500, description="Most items of these tasks in one shard.")
    alpaca_eval: str | None = Field(
        None,
        description="AlpacaEval: a file (.json or .jsonl) with instruction and output, the answers that the student's are "
        "compared with, e.g. AlpacaEval 2.0's gpt4_turbo outputs. Students are compared with each other on them, too.",
    )
    alpaca_eval_difficulty: str | None = Field(
        None,
        description="AlpacaEval's instruction_difficulty.csv, for the length-controlled win rate; without, it is left out of "
        "the model.",
    )
    mt_bench: str | None = Field(None, description="MT-Bench: its questions (.jsonl).")
    mt_bench_references: str | None = Field(
        None, description="MT-Bench: reference answers (.jsonl) to its questions of maths, coding and reasoning."
    )
    mt_bench_temperature: float | None = Field(
        None,
        ge=0.0,
        description="MT-Bench: one temperature for all questions; none decodes each category as FastChat does: writing and "
        "roleplay at 0.7, stem and humanities at 0.1, extraction, math, coding and reasoning at 0, others at 0.7.",
    )
    judge_prompts: Literal["own", "published"] = Field(
        "own",
        description="How the judge is asked: 'own' prompts, whose verdict is the last line of the answer; 'published' are "
        "AlpacaEval's (the probability of one token) and FastChat's ([[rating]]). Scores are labelled by it.",
    )
    answers: Sampling = Field(
        Sampling(temperature=0.7, top_p=1.0, presence_penalty=0.0),
        description="Decoding of the students' answers that are judged; MT-Bench has temperatures of its own.",
    )
    contamination_words: int = Field(
        8, ge=0, description="An item counts as seen if so many of its words stand in a row in training data; 0 is off."
    )

    @property
    def judged(self) -> bool:
        """Whether a judge is asked."""
        return self.alpaca_eval is not None or self.mt_bench is not None
