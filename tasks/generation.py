"""Generate texts: with a model that jobs load, or with one behind an API."""

from pathlib import Path

from montessori_core import programs
from montessori_core.config import Sampling
from montessori_core.data.rows import GenerationRow
from montessori_core.data.tables import GENERATION, read_table
from montessori_core.program import Row
from montessori_core.programs import Form
from tasks.run import ApiModel, Model
from tasks.stage import Step, warn


def generate(
    step: Step,
    model: Model | ApiModel,
    rows: list[GenerationRow],
    rows_per_shard: int,
    sampling: Sampling,
    form: Form,
    upstream: list[Path],
) -> tuple[list[Row], list[Path]]:
    """Generate with a teacher, or with a student that answers; return the generated rows and their parts."""
    if isinstance(model, ApiModel):
        parts = step.ask(model.section, programs.API_GENERATION, {"sampling": sampling}, rows, upstream)
    else:
        synthesis = step.experiment.synthesis
        settings = programs.Generation(
            engine=synthesis.engine, engine_options=synthesis.engine_options, form=form, sampling=sampling
        )
        parts = step.execute(
            programs.GENERATION, settings, rows, rows_per_shard, models={"teacher": model}, upstream=upstream
        )
    generated = read_table(parts, GENERATION).to_pylist()
    if isinstance(model, ApiModel):
        return _without_cut_thinking(generated), parts
    if full := sum(row["finish_reason"] == "length" and not row["tokens"] for row in generated):
        warn(
            step.label,
            f"{full} of {len(generated)} outputs are empty, because their prompts fill the model's positions; use a model "
            "with more, or shorten the prompts: synthesis.seed_demonstrations and, for the second turn of MT-Bench, "
            "benchmarks.answers.max_tokens",
        )
    return generated, parts


def _without_cut_thinking(generated: list[Row]) -> list[Row]:
    """Return answers of an endpoint, whose truncated texts may be thinking that the template opened and nothing ended.

    They are if all finished answers have thinking.
    """
    finished = [row for row in generated if row["finish_reason"] == "stop"]
    if not finished or any(row["thinking"] is None for row in finished):
        return generated
    return [
        row | {"thinking": row["raw_output"], "raw_output": ""}
        if row["finish_reason"] == "length" and row["thinking"] is None
        else row
        for row in generated
    ]
