"""Files that the section `benchmarks` names: checked when a run is opened, and copied into its folder."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from montessori_core.config import Benchmarks
from montessori_core.data.contamination import overlapping
from montessori_core.data.sources import Task
from montessori_core.errors import UserError
from montessori_core.files import commit
from montessori_core.judging.mt_bench import read_dialogues


def benchmark_copy(benchmarks: Benchmarks, setting: str, copies: Path) -> Path:
    """The copy of the file or folder that a setting names, in a folder of copies."""
    return copies / f"{setting}{Path(getattr(benchmarks, setting)).suffix}"


def check_benchmarks(benchmarks: Benchmarks, copies: Path) -> dict[str, list[str]]:
    """See that what the section `benchmarks` names can be used: the run's copies, once it has them.

    Returns:
        The texts that answers are judged on, by the setting that names them.

    Raises:
        UserError: something cannot; the message names it.
    """
    from montessori_core.evaluation.alpaca_eval import read_difficulties, read_outputs

    paths = _named(benchmarks)
    kept = {setting: benchmark_copy(benchmarks, setting, copies) for setting in paths}
    paths |= {setting: path for setting, path in kept.items() if path.exists()}
    for setting, path in paths.items():
        if not os.path.exists(path):
            raise UserError(f"benchmarks.{setting}: {path}: not found; correct the path")
    texts: dict[str, list[str]] = {}
    if "alpaca_eval" in paths:
        texts["alpaca_eval"] = [one.instruction for one in read_outputs(paths["alpaca_eval"])]
        outputs = len(texts["alpaca_eval"])
        if "alpaca_eval_difficulty" in paths and len(read_difficulties(paths["alpaca_eval_difficulty"])) != outputs:
            raise UserError(
                f"benchmarks.alpaca_eval_difficulty: {paths['alpaca_eval_difficulty']} is not for the {outputs} instructions "
                f"of {paths['alpaca_eval']}; it is for AlpacaEval's own, in their order: leave it out for others"
            )
    if "mt_bench" in paths:
        dialogues = read_dialogues(paths["mt_bench"], paths.get("mt_bench_references"))
        texts["mt_bench"] = [question for one in dialogues for question in one.questions]
    return texts


def seen_references(reference: list[Task], texts: Mapping[str, list[str]], words: int) -> list[str]:
    """Return a warning for each benchmark that reference instructions stand in; none if `words` is 0.

    Args:
        reference: what influence is measured on.
        texts: what answers are judged on, by the setting that names it.
        words: an instruction stands in a text that has so many of its words in a row.
    """
    warnings = []
    for setting, items in texts.items() if words else ():
        seen = overlapping([task.instruction for task in reference], items, words)
        if any(seen):
            warnings.append(
                f"{sum(seen)} of {len(reference)} reference examples also stand in benchmarks.{setting}, e.g. "
                f"{reference[seen.index(True)].example_id}: influence is measured on what students are tested on, so that "
                "their scores there say nothing about other tasks"
            )
    return warnings


def _named(benchmarks: Benchmarks) -> dict[str, Path]:
    """Files and folders that settings of the section `benchmarks` name."""
    settings = ("task_folder", "alpaca_eval", "alpaca_eval_difficulty", "mt_bench", "mt_bench_references")
    named = {setting: getattr(benchmarks, setting) for setting in settings}
    return {setting: Path(os.path.expanduser(path)) for setting, path in named.items() if path is not None}


def copy_benchmarks(benchmarks: Benchmarks, copies: Path) -> None:
    """Keep what the section `benchmarks` names as it is when it is first used."""
    for setting, path in _named(benchmarks).items():
        copy = benchmark_copy(benchmarks, setting, copies)
        if not copy.exists():
            with commit(copy) as temporary:
                (shutil.copytree if path.is_dir() else shutil.copyfile)(path, temporary)
