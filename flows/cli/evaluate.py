"""The command evaluate."""

import json
import os
import re
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.interrupt import interruptible
from flows.cli.options import (
    TEMPLATE_OPTIONS,
    ChatTemplate,
    ChatTemplateVariables,
    ClusterFile,
    names_options,
    read_content,
    template_settings,
    warn,
)
from flows.cli.tables import print_evaluation
from montessori_core import layout
from tasks.resume import resume_command


@names_options(TEMPLATE_OPTIONS)
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hugging Face id of the model.")],
    config: Annotated[
        Path,
        typer.Option(
            help="Configuration (YAML) or preset; its sections evaluation, benchmarks, judge, student (not the model), seed, "
            "cluster, and engine, engine_options and instructions_per_shard of synthesis are used."
        ),
    ] = Path("evaluation"),
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one field, e.g. benchmarks.mt_bench=FILE."),
    ] = None,
    run_root: Annotated[Path, typer.Option(help="Folder that holds runs and evaluations.")] = Path("runs"),
    name: Annotated[
        str | None, typer.Option(help="Name of the evaluation; by default derived from the model's name.")
    ] = None,
    cluster: ClusterFile = None,
    chat_template: ChatTemplate = None,
    chat_template_kwargs: ChatTemplateVariables = None,
) -> None:
    """Evaluate any model: held-out loss, lm-evaluation-harness, AlpacaEval 2.0, MT-Bench.

    To resume after an interruption, run the same command again; finished work is not repeated.
    """
    from flows.evaluation import RESULT, evaluate_opened, evaluated_experiment, open_evaluation

    run_name = name or _derive_name(model)
    settings = template_settings(chat_template, chat_template_kwargs)
    overrides = [*(set_ or []), *(f"student.{name}={json.dumps(value)}" for name, value in settings.items())]
    content, source = read_content(config, model, overrides, cluster)
    experiment = evaluated_experiment(content, model, run_name, source)
    folder = run_root / experiment.name
    evaluation, warnings = open_evaluation(experiment, folder)
    warn(warnings)
    interruptible(lambda: evaluate_opened(evaluation), folder, experiment.cluster, resume_command(folder))
    print_evaluation(folder / RESULT)


def _derive_name(model: str) -> str:
    """Return a valid name for the evaluation of a model: with other characters or '..' replaced, and cut to 80.

    Models of all runs are in folders of the same names; theirs begins with the name of the run.
    """
    folder = Path(os.path.abspath(model))
    run = next((place for place in folder.parents if (place / layout.CONFIG).exists()), None)
    name = Path(model).name or model if run is None else str(folder.relative_to(run.parent))
    return f"evaluation-{re.sub(r'[^A-Za-z0-9._-]+|[.]{2,}', '-', name)}"[:80]
