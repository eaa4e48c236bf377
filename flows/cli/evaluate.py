"""The command evaluate."""

import json
import re
import shlex
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.interrupt import interruptible
from flows.cli.options import ChatTemplate, ChatTemplateVariables, ClusterFile, on_cluster, template_settings, warn
from flows.cli.tables import print_evaluation
from montessori_core.config import read_experiment


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hugging Face id of the model.")],
    config: Annotated[
        Path,
        typer.Option(help="Configuration (YAML); its evaluation, benchmarks, judge and cluster sections are used."),
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
    from flows.evaluation import RESULT, evaluate_opened, open_evaluation

    run_name = name or "evaluation-" + re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name or model)
    settings = template_settings(chat_template, chat_template_kwargs)
    overrides = [*(set_ or []), *(f"student.{name}={json.dumps(value)}" for name, value in settings.items())]
    experiment = on_cluster(read_experiment(config, (*overrides, f"name={json.dumps(run_name)}")), cluster, config)
    folder = run_root / experiment.name
    opened, warnings = open_evaluation(experiment, model, folder)
    warn(warnings)
    command = ["montessori", "evaluate", model, "--config", str(config), "--run-root", str(run_root)]
    command += [part for override in overrides for part in ("--set", override)]
    command += ["--name", name] if name else []
    command += ["--cluster", str(cluster)] if cluster else []
    interruptible(lambda: evaluate_opened(opened), shlex.join(command))
    print_evaluation(folder / RESULT)
