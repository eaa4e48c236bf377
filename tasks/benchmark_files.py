"""Files of the section `benchmarks`: checked when a run is opened, then copied into its folder."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from montessori_core.config import Benchmarks
from montessori_core.data.contamination import overlapping
from montessori_core.data.sources import Task
from montessori_core.errors import UserError
from montessori_core.files import commit
from montessori_core.judging.mt_bench import read_dialogues


def benchmark_copy(benchmarks: Benchmarks, setting: str, copies: Path) -> Path:
    """Return the path in `copies` of the file or folder that a setting names."""
    return copies / f"{setting}{Path(getattr(benchmarks, setting)).suffix}"


def current_copies(benchmarks: Benchmarks, before: Benchmarks, copies: Path) -> dict[str, Path]:
    """Return a run's copies that are still those of the configured files, or that are configured themselves, by setting.

    Args:
        benchmarks: the configuration now.
        before: the one that the run was last opened with.
        copies: the folder of copies.
    """
    earlier, current = _benchmark_paths(before), {}
    for setting, path in _benchmark_paths(benchmarks).items():
        copy = benchmark_copy(benchmarks, setting, copies)
        if copy.exists() and (earlier.get(setting) == path or copy.resolve() == path.resolve()):
            current[setting] = copy
    return current


def check_benchmarks(benchmarks: Benchmarks, copied: Mapping[str, Path]) -> dict[str, list[str]]:
    """Check the files of the section `benchmarks`; those of `copied` are checked instead of their originals.

    Returns:
        The questions whose answers are judged, by setting.

    Raises:
        UserError: a file is missing or invalid; the message names it.
    """
    from montessori_core.evaluation.alpaca_eval import read_difficulties, read_outputs

    paths = {**_benchmark_paths(benchmarks), **copied}
    for setting, path in paths.items():
        if not os.path.exists(path):
            raise UserError(f"benchmarks.{setting}: {path}: not found; correct the path")
    texts: dict[str, list[str]] = {}
    if "alpaca_eval" in paths:
        texts["alpaca_eval"] = [output.instruction for output in read_outputs(paths["alpaca_eval"])]
        count = len(texts["alpaca_eval"])
        if "alpaca_eval_difficulty" in paths and len(read_difficulties(paths["alpaca_eval_difficulty"])) != count:
            raise UserError(
                f"benchmarks.alpaca_eval_difficulty: {paths['alpaca_eval_difficulty']} does not match the {count} "
                f"instructions of {paths['alpaca_eval']}: it is for AlpacaEval's original instructions, in their order; "
                "remove the setting for other instructions"
            )
    if "mt_bench" in paths:
        dialogues = read_dialogues(paths["mt_bench"], paths.get("mt_bench_references"))
        texts["mt_bench"] = [question for dialogue in dialogues for question in dialogue.questions]
    return texts


def overlap_warnings(reference: list[Task], texts: Mapping[str, list[str]], words: int) -> list[str]:
    """Return a warning for each benchmark that contains reference instructions; none if `words` is 0.

    Args:
        reference: the reference set.
        texts: questions of the benchmarks, by setting.
        words: a question contains an instruction if they share this many consecutive words.
    """
    warnings = []
    for setting, questions in texts.items() if words else ():
        overlaps = overlapping([task.request for task in reference], questions, words)
        if any(overlaps):
            warnings.append(
                f"{sum(overlaps)} of {len(reference)} reference examples are also in benchmarks.{setting}, e.g. "
                f"{reference[overlaps.index(True)].example_id}: influence is measured on what students are tested on, so "
                "scores of this benchmark say nothing about other tasks"
            )
    return warnings


def _benchmark_paths(benchmarks: Benchmarks) -> dict[str, Path]:
    """Return the files and folders of the section `benchmarks`, by setting."""
    settings = ("task_folder", "alpaca_eval", "alpaca_eval_difficulty", "mt_bench", "mt_bench_references")
    paths = {setting: getattr(benchmarks, setting) for setting in settings}
    return {setting: Path(os.path.expanduser(path)) for setting, path in paths.items() if path is not None}


def remove_copies(benchmarks: Benchmarks, copies: Path, copied: Mapping[str, Path]) -> None:
    """Remove the copies that `copied_benchmarks` replaces."""
    for setting in _benchmark_paths(benchmarks).keys() - copied.keys():
        copy = benchmark_copy(benchmarks, setting, copies)
        if copy.is_dir():
            removed = copy.with_name(f".{copy.name}.removed")  # a folder of which a part is left would count as a copy
            shutil.rmtree(removed, ignore_errors=True)
            shutil.rmtree(copy.rename(removed))
        else:
            copy.unlink(missing_ok=True)


@contextmanager
def copied_benchmarks(benchmarks: Benchmarks, copies: Path, copied: Mapping[str, Path]) -> Iterator[None]:
    """Copy the files of the section `benchmarks` to a folder, except those of `copied`.

    The copies are complete when the block begins, and take their places when it ends.
    """
    with ExitStack() as commits:
        for setting, path in _benchmark_paths(benchmarks).items():
            if setting not in copied:
                temporary = commits.enter_context(commit(benchmark_copy(benchmarks, setting, copies)))
                (shutil.copytree if path.is_dir() else shutil.copyfile)(path, temporary)
        yield
