"""The command preview: the first examples of a run, before it is started."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.console import console
from flows.cli.interrupt import cancelled_by_signals
from flows.cli.options import ClusterFile, Overrides, on_cluster, warn
from montessori_core.config import read_experiment
from montessori_core.formatting import duration
from montessori_core.program import Row
from montessori_core.synthesis.filtering import SURPLUS

if TYPE_CHECKING:
    from tasks.preview import Preview

_LONGEST = 1_000  # characters of a text that are shown without --full


def preview(
    config: Annotated[Path, typer.Argument(help="Configuration: a YAML file or a preset, e.g. quickstart.")],
    set_: Overrides = None,
    examples: Annotated[int, typer.Option(min=1, max=1000, help="About how many examples to write.")] = 10,
    full: Annotated[bool, typer.Option("--full", help="Show every prompt, and texts of any length.")] = False,
    run_root: Annotated[
        Path, typer.Option(help="Folder for the preview's files while it runs; the nodes of a cluster must see it.")
    ] = Path("runs"),
    cluster: ClusterFile = None,
) -> None:
    """Write about ten examples with a run's own teacher, prompts and filters, and show them.

    They are the first of the run's probing set. Nothing is kept: the run is not started, and finds nothing of the preview.
    """
    from tasks.preview import preview_run, write_preview

    experiment = on_cluster(read_experiment(config, tuple(set_ or [])), cluster, config, set_ or ())
    with cancelled_by_signals(), preview_run(experiment, run_root) as (run, warnings):
        warn(warnings)
        written = write_preview(run, examples)
    _print_examples(written, full)
    _print_summary(written)


def _print_examples(written: "Preview", full: bool) -> None:
    """Print each prompt with its candidates, their verdicts and responses."""
    responses = {row["example_id"]: row for row in written.examples}
    for number, (prompt_id, prompt) in enumerate(written.prompts.items()):
        shown = [row for row in written.candidates if row["prompt_id"] == prompt_id]
        console.print(f"\nprompt {prompt_id}", style="bold")
        if number == 0 or full:
            _print_text("", shown[0]["prompt"], full)
        else:
            console.print(f"  demonstrations: {', '.join(task.example_id for task in prompt.demonstrations)}")
        for row in shown:
            _print_candidate(row, responses.get(row["example_id"]), full)


def _print_candidate(row: Row, response: Row | None, full: bool) -> None:
    verdict = row["rejection"] or "kept"
    style = "green" if verdict == "kept" else "dim" if verdict == SURPLUS else "red"
    console.print(f"  {row['example_id']}: {verdict}", style=style, end="")
    console.print(f"  ({row['tokens']} tokens)")
    _print_text("instruction", row["raw_output"] if row["instruction"] is None else row["instruction"], full)
    if response is not None:
        end = "" if response["response_finished"] else ", cut at max_tokens"
        _print_text(f"response ({response['response_tokens']} tokens{end})", response["response"], full)


def _print_text(name: str, text: str, full: bool) -> None:
    """Print a text that a model wrote or read, each line after a bar."""
    if name:
        console.print(f"    {name}")
    cut = text if full or len(text) <= _LONGEST else f"{text[:_LONGEST]} ... ({len(text):,} characters; --full)"
    for line in cut.splitlines() or [""]:
        console.print(f"    | {line}", soft_wrap=True)


def _print_summary(written: "Preview") -> None:
    """Print the funnel, the tokens and the time per example."""
    reasons = Counter(row["rejection"] for row in written.candidates)
    kept = len(written.examples)
    console.print(
        f"\n{len(written.candidates)} candidates of {len(written.prompts)} prompts, {kept} examples", style="bold"
    )
    for reason, count in reasons.most_common():
        if reason is not None:
            console.print(f"  {count:4d} {reason}")
    tokens = sum(row["tokens"] for row in written.candidates)
    answered = sum(row["response_tokens"] for row in written.examples)
    console.print(f"tokens: {tokens:,} of candidates, {answered:,} of responses")
    seconds = written.seconds_per_example
    pace = f", {seconds:.2f} s of a job per example" if seconds is not None else ""
    console.print(f"time: {duration(written.seconds)} in all, with starting jobs and loading models{pace}")
