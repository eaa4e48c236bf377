"""The command train: train a student on any data."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.console import console
from flows.cli.options import (
    TEMPLATE_OPTIONS,
    ChatTemplate,
    ChatTemplateVariables,
    ClusterFile,
    data_source,
    names_options,
    read_content,
    template_settings,
    warn,
)


@names_options({"data": "DATA", **TEMPLATE_OPTIONS})
def train(
    student: Annotated[str, typer.Argument(help="Folder or Hugging Face id of the student.")],
    data: Annotated[
        str,
        typer.Argument(
            help="Examples: a file of montessori select, an example table of a run, or any data as in a configuration, also "
            "as a mapping, e.g. '{path: rows.jsonl, drop_bad_rows: true}'."
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="New folder for the trained student; DIR.parts next to it makes it resumable.")
    ],
    config: Annotated[
        Path,
        typer.Option(
            help="Configuration (YAML) or preset; its sections student (not the model), training, zero, seed, tracking and "
            "cluster are used."
        ),
    ] = Path("evaluation"),
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one field, e.g. training.epochs=3."),
    ] = None,
    cluster: ClusterFile = None,
    save_moments: Annotated[
        bool, typer.Option("--save-moments", help="Save AdamW's moments, for montessori influence --warm-state.")
    ] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge the adapter of a LoRA student into its base model (float32).")
    ] = False,
    chat_template: ChatTemplate = None,
    chat_template_kwargs: ChatTemplateVariables = None,
) -> None:
    """Train a student on all rows of any data, by the recipe of a configuration.

    To resume after an interruption, run the same command again; a finished training is not repeated.
    """
    from flows.training import StudentTraining, train_on_data, training_experiment
    from tasks.gpu_check import idle_gpus

    examples = data_source(data, "DATA")
    settings = template_settings(chat_template, chat_template_kwargs)
    overrides = [f"student.{name}={json.dumps(value)}" for name, value in settings.items()]
    content, source = read_content(config, student, [*(set_ or []), *overrides], cluster)
    experiment = training_experiment(content, student, source)
    warn(idle_gpus(experiment.cluster))
    trained = train_on_data(StudentTraining(experiment, examples, save_moments, merge), output, sys.argv[1:])
    counts = ", ".join(f"{name.replace('_', ' ')} {number:,}" for name, number in trained.counts.items())
    console.print(f"{counts}; loss {trained.log[0]['loss']:.4f}, at the end {trained.log[-1]['loss']:.4f}")
    console.print(f"student: {output}", soft_wrap=True)
