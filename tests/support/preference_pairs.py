"""A few preference pairs, as rows of a teacher update; updates of an adapter on them."""

from pathlib import Path

from montessori_core import programs
from montessori_core.config import Lora, Schedule, TeacherUpdate, Zero
from montessori_core.program import Row
from support.row_programs import run_in_job

PAIRS: list[Row] = [
    {
        "prompt": f"Tasks:\n<instruction>Count to {i}.</instruction>\n<instruction>",
        "chosen": f"Name {i} rivers and a lake.</instruction>",
        "rejected": f"Stop {i}.</instruction>",
    }
    for i in range(8)
]

LORA_RECIPE = TeacherUpdate(
    learning_rate=1e-2,
    batch_size=2,
    micro_batch_size=1,
    schedule=Schedule(warmup=0.0, stable=1.0, decay=0.0),
    lora=Lora(rank=4, alpha=8),
)


def update(
    folder: Path, teacher: Path, recipe: TeacherUpdate = LORA_RECIPE, stage: int = 0, processes: int = 1
) -> Path:
    """Update a teacher on the pairs by a ZeRO stage, in one job; return its folder."""
    settings = programs.Dpo(prompt_style="completion", recipe=recipe, zero=Zero(stage=stage), seed=0)
    return run_in_job(folder, programs.DPO, settings, {"teacher": teacher}, PAIRS, processes)
