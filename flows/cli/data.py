"""The command data check: what a data source holds, and how a run reads it."""

from typing import Annotated, Literal, get_args

import typer
from rich.table import Table
from rich.text import Text

from flows.cli.console import console
from flows.cli.options import (
    TEMPLATE_OPTIONS,
    ChatTemplate,
    ChatTemplateVariables,
    data_source,
    names_options,
    student_with_template,
    with_options,
)
from montessori_core.data.bad_rows import BadRow
from montessori_core.data.files import COMPRESSIONS, KINDS
from tasks.data_check import NEAR, DataCheck, Part, check_data

Set = Literal["seed_pool", "reference", "evaluation", "examples"]
_LONGEST = 2_000  # characters of a part that are shown
_MOST_REASONS = 10
_MOST_ROUNDS = 8

Source = Annotated[
    str,
    typer.Argument(
        help=f"A file ({', '.join(KINDS)}, each also with {', '.join(COMPRESSIONS)}), a folder or glob of them, "
        "a folder of save_to_disk, a Hugging Face data set id, an fsspec URL, or 'builtin'. Or a mapping as in a "
        "configuration, e.g. '{path: rows.json, format: sharegpt, train_on: last}'."
    ),
]
Model = Annotated[
    str | None,
    typer.Option(help="Folder or Hugging Face id of the student: count its tokens and show its chat template."),
]
Role = Annotated[Set, typer.Option("--as", help="The set that a run would read it as; a seed pool needs no responses.")]

OPTIONS = {**dict.fromkeys(get_args(Set), "SOURCE"), **TEMPLATE_OPTIONS}
"""See `names_options`."""


@names_options(OPTIONS)
def check(
    source: Source,
    model: Model = None,
    as_: Role = "reference",
    max_length: Annotated[
        int, typer.Option(min=32, help="Maximum tokens of an example; the end of longer ones is cut.")
    ] = 1024,
    chat_template: ChatTemplate = None,
    chat_template_kwargs: ChatTemplateVariables = None,
) -> None:
    """Show what a run would read from a data source, before it does.

    The format is recognised from the first row:
      [b]alpaca[/b]              instruction, input (optional), output
      [b]messages[/b]            messages: a list of role and content
      [b]sharegpt[/b]            conversations: a list of from and value
      [b]prompt_completion[/b]   prompt and completion, texts or lists of messages (TRL)
    Conversations are read whole, with loss on every answer. Other names of columns and other rules are fields of a mapping:
      montessori data check '{path: rows.parquet, instruction_field: task.question, output_field: answer}'
      montessori data check '{path: chats.jsonl, train_on: last, system_turn: drop, drop_bad_rows: true}'

    [b]bad rows[/b] are counted by reason, each with its first row. A run refuses them, unless drop_bad_rows is set.
    [b]near duplicates[/b] are instructions with a ROUGE-L above 0.9.
    [b]languages[/b] are those of instructions, as the filter language tells them; of a few words or a formula it is unknown.
    With --model, the first rows are shown as the student reads them; the tokens with loss are green.

    The exit status is 1 if a run would refuse the data.
    """
    settings = data_source(source, "SOURCE")
    tokenizer = None
    if model is not None:
        from montessori_core.models.fetch import fetch_model
        from montessori_core.models.load import load_tokenizer
        from montessori_core.models.templates import configured_template

        tokenizer = load_tokenizer(model)
        student = student_with_template(model, max_length, chat_template, chat_template_kwargs)
        if (template := configured_template(fetch_model(model), student, "student")) is not None:
            tokenizer.chat_template = template
    result = check_data(settings, as_, as_ != "seed_pool", tokenizer, max_length)
    print_check(result, max_length)
    beyond = result.without_response and as_ in ("reference", "evaluation")
    if result.refusal or result.too_few or beyond:
        raise typer.Exit(1)


def print_check(result: DataCheck, max_length: int) -> None:
    """Print what a data source holds."""
    console.print(f"{result.tasks:,} rows, format: {result.format}")
    _print_bad_rows(result.bad_rows, result.refusal)
    console.print(f"exact duplicates: {result.duplicates:,}")
    _print_turns(result)
    of_all = result.sampled == result.tasks
    console.print("" if of_all else f"\nof a random sample of {result.sampled:,} rows:")
    table = Table(f"length in {result.unit}", "shortest", "median", "90 %", "99 %", "longest")
    for name, values in result.lengths.items():
        table.add_row(name, *(f"{value:,}" for value in values))
    console.print(table)
    if result.truncated is not None:
        console.print(f"longer than {max_length:,} tokens, cut: {result.truncated:,}")
    if result.without_response:
        console.print(f"without a response within {max_length:,} tokens: {result.without_response:,}", style="red")
    if result.too_few:
        console.print(with_options(result.too_few, OPTIONS), style="red", soft_wrap=True)
    near, pair = result.near_duplicates
    console.print(f"near duplicates (ROUGE-L above {NEAR}): {near:,}")
    for text in pair or ():
        console.print(f"  {text[:100]!r}", soft_wrap=True)
    shares = [f"{name or 'unknown'} {count / result.sampled:.1%}" for name, count in result.languages.most_common()]
    console.print(f"languages: {', '.join(shares)}", soft_wrap=True)
    for number, parts in enumerate(result.first, 1):
        console.print(f"\nrow {number}", style="bold")
        console.print(_colored(parts), soft_wrap=True)


def _print_turns(result: DataCheck) -> None:
    """Print how many rounds conversations have; nothing for single turns."""
    if set(result.rounds) - {1}:
        counts = (f"{rounds} in {count:,} rows" for rounds, count in sorted(result.rounds.items())[:_MOST_ROUNDS])
        longest = f"; at most {max(result.rounds)}" if len(result.rounds) > _MOST_ROUNDS else ""
        console.print(f"rounds of user and assistant: {', '.join(counts)}{longest}", soft_wrap=True)
    if result.system_turns:
        moved = "; the chat template takes none: its text is put before the first user turn"
        console.print(
            f"system turns: {result.system_turns:,}{moved if result.moves_system_turn else ''}", soft_wrap=True
        )


def _print_bad_rows(rows: list[BadRow], refused: bool) -> None:
    if not rows:
        console.print("bad rows: none")
        return
    firsts: dict[str, BadRow] = {}
    counts: dict[str, int] = {}
    for row in rows:
        firsts.setdefault(row.reason, row)
        counts[row.reason] = counts.get(row.reason, 0) + 1
    mapping = "SOURCE '{path: ..., drop_bad_rows: true, max_bad_rows: ...}'"
    outcome = f"a run refuses them; correct them, or leave them out: {mapping}" if refused else "left out"
    console.print(f"bad rows: {len(rows):,} ({outcome})", style="red" if refused else "yellow")
    for reason in sorted(counts, key=counts.__getitem__, reverse=True)[:_MOST_REASONS]:
        first = firsts[reason]
        problem = with_options(first.problem, OPTIONS)
        console.print(f"  {counts[reason]:,} {reason}; the first: {first.place}: {problem}", soft_wrap=True)


def _colored(parts: list[Part]) -> Text:
    """Return the parts of a row; those with loss are green."""
    text = Text()
    for part, trained in parts:
        more = f" ... ({len(part) - _LONGEST:,} more characters)" if len(part) > _LONGEST else ""
        text.append(part[:_LONGEST] + more, style="green" if trained else "")
    return text
