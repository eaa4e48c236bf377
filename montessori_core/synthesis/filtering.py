"""Apply the filters of `synthesis.filters` to the candidates of a teacher, and count the rejections by filter and reason."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from montessori_core.config import FilterSettings, OwnFilter, Synthesis, parse
from montessori_core.data.sources import Task
from montessori_core.errors import ConfigError, UserError
from montessori_core.program import load
from montessori_core.synthesis.filters import REGISTRY
from montessori_core.synthesis.filters.filter import Candidate, Context, Filter, Reject
from montessori_core.synthesis.prompts import Prompt

# Rejections that no filter gives.
CUT_THINKING = "thinking was cut off"
NO_TAGS = "no instruction tags"
EMPTY = "empty instruction"
UNFINISHED = "no complete turn"
INCOMPLETE = "no complete conversation"
REPETITION = "repeats itself"
CODE = "about code"
EMPTY_RESPONSE = "empty response"
SURPLUS = "more than asked for"
_BEFORE = (CUT_THINKING, NO_TAGS, EMPTY, UNFINISHED, INCOMPLETE, REPETITION, CODE)
_LONGEST_REASON = 80
_TRIED = 500  # seeds on which the filters are tried


@dataclass(frozen=True)
class Verdict:
    """The result for one candidate: its instruction and the reason of its rejection; either may be None."""

    instruction: str | None
    rejection: str | None


@dataclass(frozen=True)
class OpenFilter:
    """A filter that is opened with its settings.

    Attributes:
        label: how the configuration names it.
        entry: its settings in the configuration.
        filter: the filter.
        reject: its function.
        measured: results of its jobs by instruction and response; the caller adds to it before `judge`.
    """

    label: str
    entry: FilterSettings
    filter: Filter
    reject: Reject
    measured: dict[tuple[str, str], Any]

    def judge(self, candidate: Candidate) -> str | None:
        """Return why a candidate is rejected, as `filter: reason`; None if it passes.

        Raises:
            UserError: a custom filter failed.
        """
        reason = _reason(self.label, self.reject, candidate)
        return None if reason is None else rejection_by(self.filter, reason)


class OpenFilters:
    """The filters of a set of examples, in order, and the instructions that passed them.

    Attributes:
        accepted: instructions that must not be repeated, then those that passed the filters of instructions.
        seeds: instructions of the seed pool.
        of_instructions, of_examples: the filters that read instructions alone, and those that read responses, too.
    """

    def __init__(self, settings: Synthesis, accepted: Iterable[str] = (), seeds: Sequence[str] = ()) -> None:
        """Open the filters; `accepted` are instructions that must not be repeated, `seeds` the human-written ones.

        Raises:
            ConfigError: a custom filter cannot be imported or opened, or its settings are not valid.
        """
        self.accepted, self.seeds = list(accepted), seeds
        filters = [_open(entry, Context(settings.in_english, self.accepted, seeds)) for entry in settings.filters]
        labels: dict[str, str] = {}
        for opened in filters:
            name = opened.filter.name
            if labels.setdefault(name, opened.label) != opened.label:
                raise ConfigError(
                    f"synthesis.filters: {opened.label} and {labels[name]} have the same name {name!r}; rename one"
                )
        self.of_instructions = [opened for opened in filters if opened.filter.reads == "instructions"]
        self.of_examples = [opened for opened in filters if opened.filter.reads == "examples"]

    def judge(self, candidate: Candidate) -> str | None:
        """Return why an instruction is rejected, as `filter: reason`; None, and remember it, if it passes.

        Raises:
            UserError: a custom filter failed.
        """
        for opened in self.of_instructions:
            if (rejection := opened.judge(candidate)) is not None:
                return rejection
        self.accepted.append(candidate.instruction)
        return None


def rejection_by(filter: Filter, reason: str) -> str:
    """Return the rejection that the table of instructions has for a filter's reason."""
    return f"{filter.name}: {reason}"


def find_filter(name: str) -> Filter:
    """Return a filter of the registry by its name, or a custom one by `module:NAME`.

    Raises:
        ConfigError: no such filter.
    """
    if name in REGISTRY:
        return REGISTRY[name]
    try:
        filter = load(name)
    except Exception as error:
        raise ConfigError(
            f"synthesis.filters: {name}: {short_error(error)}; the module must be importable where the driver runs: put its "
            "folder on PYTHONPATH"
        ) from error
    if not isinstance(filter, Filter):
        raise ConfigError(f"synthesis.filters: {name} is not a montessori_core.synthesis.filters.filter.Filter")
    if filter.name in REGISTRY or not re.fullmatch(r"\w{1,40}", filter.name):
        raise ConfigError(
            f"synthesis.filters: {name}: its name {filter.name!r} is taken or not valid; use up to 40 letters, digits and '_'"
        )
    return filter


def _open(entry: FilterSettings, context: Context) -> OpenFilter:
    filter, measured = find_filter(entry.name), dict[tuple[str, str], Any]()
    context = replace(context, measured=measured)
    if not isinstance(entry, OwnFilter):
        return OpenFilter(entry.name, entry, filter, filter.open(entry, context), measured)
    try:
        settings = parse(filter.settings, entry.settings, f"synthesis.filters: {entry.name}: the mapping settings")
        return OpenFilter(entry.name, entry, filter, filter.open(settings, context), measured)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"synthesis.filters: {entry.name} cannot be opened: {short_error(error)}; correct its settings or its module"
        ) from error


def _reason(label: str, reject: Reject, candidate: Candidate) -> str | None:
    try:
        reason = reject(candidate)
    except Exception as error:
        raise UserError(
            f"synthesis.filters: {label} failed with {short_error(error)} on the instruction {candidate.instruction[:200]!r}"
            "; correct its module, or remove the filter"
        ) from error
    if reason is None:
        return None
    if not isinstance(reason, str) or not reason.strip() or "\n" in reason or len(reason) > _LONGEST_REASON:
        raise UserError(
            f"synthesis.filters: {label} gave {reason!r:.200} on the instruction {candidate.instruction[:200]!r}; it must "
            f"return None, or a reason of one line and at most {_LONGEST_REASON} characters"
        )
    return reason


def short_error(error: Exception) -> str:
    """Return type and message of an error in the user's code, at most 300 characters."""
    return f"{type(error).__name__}: {error}"[:300]


def check_filters(settings: Synthesis, seed_pool: Sequence[Task]) -> list[str]:
    """Open the filters and try them on seeds; return a warning if they reject more than half of these.

    Raises:
        UserError: a filter cannot be opened, or fails on a seed.
    """
    filters = OpenFilters(settings)
    filters.of_instructions = [opened for opened in filters.of_instructions if not opened.filter.has_jobs]
    rejections = Counter(filters.judge(Candidate(task.instruction)) for task in seed_pool[:_TRIED])
    passed = rejections.pop(None, 0)
    if rejections.total() <= passed:
        return []
    rejection, number = rejections.most_common(1)[0]
    return [
        f"synthesis.filters reject {rejections.total()} of {rejections.total() + passed} seeds, {number} for "
        f"{rejection!r}: instructions like the seeds will not be kept; change the filters, synthesis.language or the seeds"
    ]


def filter_candidates(
    instructions: Sequence[str | None], prompts: Sequence[Prompt], filters: OpenFilters, missing: str = NO_TAGS
) -> list[Verdict]:
    """Filter the instructions of candidates in order.

    Args:
        instructions: [candidates] extracted from the outputs of the teacher; None if an output has none.
        prompts: [candidates] their prompts.
        filters: the filters, which remember the instructions that passed.
        missing: reason of a rejection without an instruction.
    """
    verdicts = []
    for instruction, prompt in zip(instructions, prompts, strict=True):
        if not instruction:
            verdicts.append(Verdict(instruction, missing if instruction is None else EMPTY))
            continue
        demonstrations = tuple(task.instruction for task in prompt.demonstrations)
        verdicts.append(Verdict(instruction, filters.judge(Candidate(instruction, demonstrations))))
    return verdicts


def funnel(instructions: pa.Table) -> dict[str, int]:
    """Count the candidates of an instruction table, those rejected for each reason, and those kept.

    Reasons are in the order of extraction, the shipped filters of instructions, custom filters, empty responses, and the
    shipped filters of examples.
    """
    reasons = Counter(reason for reason in instructions["rejection"].to_pylist() if reason is not None)
    rejected = {reason: reasons[reason] for reason in sorted(reasons, key=_place)}
    return {"candidates": instructions.num_rows, **rejected, "kept": instructions.num_rows - reasons.total()}


def _place(rejection: str) -> tuple[int, str]:
    """Return a sort key: the place in the funnel, then the text."""
    of_examples = [name for name, filter in REGISTRY.items() if filter.reads == "examples"]
    order = [
        *_BEFORE,
        *(name for name in REGISTRY if name not in of_examples),
        "",
        EMPTY_RESPONSE,
        *of_examples,
        SURPLUS,
    ]
    name = rejection.partition(":")[0]
    return order.index(name if name in order else ""), rejection
