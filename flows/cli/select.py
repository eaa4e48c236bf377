"""The command select: choose training data from a pool of scored examples."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from tqdm import tqdm

from flows.cli.console import console
from flows.cli.options import data_source, names_options, warn
from montessori_core.errors import UserError

if TYPE_CHECKING:
    from montessori_core.selection.choose import Choice, Control
    from montessori_core.selection.embeddings import Vectors
    from montessori_core.selection.pools import Pool


Scored = Annotated[
    list[str],
    typer.Argument(
        help="Scored rows: a data file, a glob or a folder of such files, an exported folder, the folder of a run, or an "
        "fsspec URL, such as s3://bucket/pool.parquet, which is copied to the temporary folder. Or influence tables of the "
        "same examples, each measured on the reference set of a target; targets take turns."
    ),
]
RowCount = Annotated[
    int | None, typer.Option("--k", min=1, help="Number of rows. Give one of --k, --share and --tokens.")
]
TokenBudget = Annotated[int | None, typer.Option(min=1, help="Maximum sum of --token-column over the chosen rows.")]
Share = Annotated[float | None, typer.Option(min=0, max=1, help="Share of the rows that have a score, e.g. 0.1.")]
ScoreColumns = Annotated[
    list[str] | None,
    typer.Option(
        metavar="COLUMN",
        help="Column of the score; higher is better. Given several times, once per target: the best row of the first "
        "column, of the second, and so on; each row once.",
        show_default="influence; of several tables, their influence_NAME columns",
    ),
]
TurnColumn = Annotated[
    str | None,
    typer.Option(
        metavar="COLUMN", help="Column of groups, such as sources or clusters; rows are chosen from each group in turn."
    ),
]
MaxRougeL = Annotated[
    float | None,
    typer.Option(
        "--max-rouge-l",
        min=0,
        max=1,
        help="Skip a row whose instruction has a higher ROUGE-L than this with that of a chosen row, e.g. 0.7.",
    ),
]
EmbeddingModel = Annotated[
    str | None,
    typer.Option(
        metavar="DIR_OR_ID",
        help="Model whose embeddings --max-similarity and --clusters compare: the mean of its last hidden states, e.g. "
        "sentence-transformers/all-MiniLM-L6-v2.",
    ),
]
MaxSimilarity = Annotated[
    float | None,
    typer.Option(
        min=-1,
        max=1,
        help="Skip a row whose embedding has a higher cosine than this with that of a chosen row, e.g. 0.9.",
    ),
]
Clusters = Annotated[
    int | None,
    typer.Option(min=2, help="Put the scored rows into this many clusters by their embeddings; clusters take turns."),
]
ControlName = Annotated[
    str | None,
    typer.Option(
        help="Choose a control of the same size instead: random (any rows), or length_matched (other rows of the same "
        "lengths; selected rows only if no others remain, with a warning)."
    ),
]
TokenColumn = Annotated[
    str, typer.Option(metavar="COLUMN", help="Column with the tokens of a row, for --tokens and length_matched.")
]
Texts = Annotated[str | None, typer.Option(help="Texts of an influence table: the --examples of montessori influence.")]
TextFormat = Annotated[
    str | None,
    typer.Option(help="Write the texts of --examples as messages or sharegpt. Conversations are messages by default."),
]


@names_options({"examples": "--examples"})
def select(
    scored: Scored,
    output: Annotated[Path, typer.Option(help="New file, .jsonl or .parquet. Nothing is overwritten.")],
    k: RowCount = None,
    share: Share = None,
    tokens: TokenBudget = None,
    by: ScoreColumns = None,
    per: TurnColumn = None,
    max_rouge_l: MaxRougeL = None,
    embedding_model: EmbeddingModel = None,
    max_similarity: MaxSimilarity = None,
    clusters: Clusters = None,
    control: ControlName = None,
    seed: Annotated[int, typer.Option(help="Random seed of a control.")] = 0,
    token_column: TokenColumn = "response_tokens",
    examples: Texts = None,
    to: TextFormat = None,
) -> None:
    """Choose the best rows of a scored pool, or a control of the same size.

    Of equal scores the earlier row is chosen; rows without a score never are. The file has all columns of the pool and
    `rank`, which replaces one of that name; montessori train reads it.
    """
    from montessori_core.selection.choose import Choice, choose, scored_positions
    from montessori_core.selection.embeddings import CLUSTER, cluster_pool
    from montessori_core.selection.remote import open_any_pools
    from montessori_core.selection.write import check_output, write_chosen

    if [k, share, tokens].count(None) != 2:
        raise UserError("give one of --k, --share and --tokens")
    if per is not None and clusters is not None:
        raise UserError("give one of --per and --clusters: the groups that take turns")
    check_embeddings(embedding_model, max_similarity, clusters)
    chosen_control = check_control(control)
    check_scores(by or [])
    check_output(output)
    check_format(to)
    source = data_source(examples, "--examples") if examples else None
    with open_any_pools(scored, source, form=to) as (pool, targets):
        scores = tuple(by or targets)
        scored_rows = scored_positions(pool, scores)
        available = len(scored_rows)
        if not available:
            raise UserError(f"{pool.name}: no row has a score in {' or '.join(map(repr, scores))}")
        warn(_replaced_columns(pool, clusters is not None))
        rows = max(1, round(share * available)) if share is not None else k
        with open_vectors(pool, embedding_model) as vectors:
            if clusters is not None and vectors is not None:
                pool, per = cluster_pool(pool, vectors, scored_rows, clusters), CLUSTER
            choice = Choice(scores, rows, tokens, per, max_rouge_l, max_similarity, token_column)
            chosen = choose(pool, choice, chosen_control, seed, vectors)
        if not chosen:
            raise UserError(f"--tokens {tokens}: the best row alone has more; raise it")
        warn(_warnings(len(chosen), available, choice, chosen_control))
        write_chosen(pool, chosen, output)
        console.print(
            f"{len(chosen):,} of {available:,} scored rows{_ranges(pool, chosen, scores)}: {output}", soft_wrap=True
        )


def _replaced_columns(pool: "Pool", clustered: bool) -> list[str]:
    """Return warnings of columns that have the name of an added one."""
    from montessori_core.selection.embeddings import CLUSTER
    from montessori_core.selection.pools import column_names
    from montessori_core.selection.write import RANK

    present = column_names(pool)
    added = [RANK, CLUSTER] if clustered else [RANK]
    return [f"the pool's column {name!r} is replaced" for name in added if name in present]


def _warnings(chosen: int, available: int, choice: "Choice", control: "Control | None") -> list[str]:
    """Return warnings of fewer rows than wanted, and of a control that contains selected rows."""
    warnings = []
    if choice.rows is not None and chosen < choice.rows:
        unlike = choice.max_rouge_l is not None or choice.max_similarity is not None
        left_out = ", and the others are similar to these" if unlike else ""
        warnings.append(f"{chosen:,} rows instead of {choice.rows:,}: {available:,} have a score{left_out}")
    others = available - chosen
    if control == "length_matched" and others < chosen:
        warnings.append(
            f"{chosen - others:,} of the {chosen:,} rows of the control are selected rows, too: {others:,} others have a "
            "score"
        )
    return warnings


def check_embeddings(model: str | None, max_similarity: float | None, clusters: int | None) -> None:
    """Check that there is a model of embeddings exactly if an option compares them.

    Raises:
        UserError: the model is missing, or no option uses it.
    """
    if (model is None) != (clusters is max_similarity is None):
        raise UserError(
            "--max-similarity and --clusters compare embeddings: give --embedding-model with them, and only then"
        )


def check_scores(by: list[str]) -> None:
    """Check the columns of --by.

    Raises:
        UserError: one is given twice.
    """
    for name in by:
        if by.count(name) > 1:
            raise UserError(f"--by {name}: given twice; give the column of each target once")


def check_control(name: str | None) -> "Control | None":
    """Return the control of --control.

    Raises:
        UserError: there is no such control.
    """
    from montessori_core.selection.choose import Control

    controls: dict[str, Control] = {control: control for control in get_args(Control)}
    if name not in (None, *controls):
        raise UserError(f"--control {name}: no such control; give one of {', '.join(controls)}")
    return controls[name] if name else None


def check_format(name: str | None) -> None:
    """Check the format of --to.

    Raises:
        UserError: there is no such format.
    """
    from montessori_core.export.formats import CONVERSATION_FORMATS

    if name not in (None, *CONVERSATION_FORMATS):
        raise UserError(f"--to {name}: no such format; give one of {', '.join(CONVERSATION_FORMATS)}")


@contextmanager
def open_vectors(pool: "Pool", model: str | None) -> Iterator["Vectors | None"]:
    """Yield the embeddings of a pool's rows by a model, if one is given, with a progress bar.

    Raises:
        UserError: the model cannot be loaded.
    """
    if model is None:
        yield None
        return
    from montessori_core.models.embeddings import Embedder
    from montessori_core.models.fetch import fetch_model
    from montessori_core.selection.embeddings import Vectors

    try:
        embedder = Embedder(fetch_model(model), 256, "--embedding-model")
    except ImportError as error:
        raise UserError(
            f"--embedding-model needs the worker's libraries ({error}); pip install 'montessori[train]'"
        ) from error
    with TemporaryFile() as file, tqdm(desc="embeddings", unit=" rows", dynamic_ncols=True) as bar:
        yield Vectors(pool, file, embedder.embed, embedder.BATCH, bar.update)


def _ranges(pool: "Pool", chosen: list[int], by: tuple[str, ...]) -> str:
    """Return the range of each score of the chosen rows, for people: ', influence 0.1 to 0.3'."""
    from montessori_core.selection.choose import number_in

    numbers: dict[str, list[float]] = {name: [] for name in by}
    for _, row in pool.take(set(chosen), by):
        for name in by:
            if (number := number_in(row[name])) is not None and math.isfinite(number):
                numbers[name].append(number)
    return "".join(f", {name} {min(scores):.4g} to {max(scores):.4g}" for name, scores in numbers.items() if scores)
