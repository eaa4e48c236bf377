"""Apply the filters of `synthesis.filters` to the candidates of a teacher, and count the rejections by filter and reason."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from montessori_core.config import FilterSettings, OwnFilter, Synthesis, parse
from montessori_core.data.sources import Task
from montessori_core.errors import ConfigError, UserError
from montessori_core.program import load
from montessori_core.synthesis.extraction import extract_instruction
from montessori_core.synthesis.filters import REGISTRY
from montessori_core.synthesis.filters.filter import Candidate, Context, Filter, Reject
from montessori_core.synthesis.prompts import Prompt

# Reasons that are no filter's, before and after the filters.
CUT_THINKING = "thinking was cut off"
NO_TAGS = "no instruction tags"
EMPTY = "empty instruction"
INCOMPLETE = "no complete conversation"
REPETITION = "repeats itself"
CODE = "about code"
EMPTY_RESPONSE = "empty response"
SURPLUS = "more than asked for"
_BEFORE, _AFTER = (CUT_THINKING, NO_TAGS, EMPTY, INCOMPLETE, REPETITION, CODE), (EMPTY_RESPONSE, SURPLUS)
_LONGEST_REASON = 80
_TRIED = 500  # seeds on which the filters are tried


@dataclass(frozen=True)
class Verdict:
    """The result for one candidate: its instruction and the reason of its rejection; either may be None."""

    instruction: str | None
    rejection: str | None


class OpenFilters:
    """The filters of a set of examples, in order, and the instructions that passed them."""

    def __init__(self, settings: Synthesis, accepted: Iterable[str] = ()) -> None:
        """Open the filters; `accepted` are instructions that must not be repeated.

        Raises:
            ConfigError: a filter of the user's cannot be imported or opened, or its settings are not valid.
        """
        self._accepted = list(accepted)
        context = Context(settings.in_english, self._accepted)
        self._filters = [_open(entry, context) for entry in settings.filters]
        labels: dict[str, str] = {}
        for label, filter, _ in self._filters:
            if labels.setdefault(filter.name, label) != label:
                raise ConfigError(
                    f"synthesis.filters: {label} and {labels[filter.name]} have the same name {filter.name!r}; rename one"
                )

    def judge(self, candidate: Candidate) -> str | None:
        """Return why an instruction is rejected, as `filter: reason`; None, and remember it, if it passes.

        Raises:
            UserError: a filter of the user's failed.
        """
        for label, filter, reject in self._filters:
            reason = _reason(label, reject, candidate)
            if reason is not None:
                return rejection_by(filter, reason)
        self._accepted.append(candidate.instruction)
        return None


def rejection_by(filter: Filter, reason: str) -> str:
    """Return the rejection that the table of instructions has for a filter's reason."""
    return f"{filter.name}: {reason}"


def find_filter(name: str) -> Filter:
    """Return a filter of the registry by its name, or a user's filter by `module:NAME`.

    Raises:
        ConfigError: no such filter.
    """
    if name in REGISTRY:
        return REGISTRY[name]
    try:
        filter = load(name)
    except Exception as error:
        raise ConfigError(
            f"synthesis.filters: {name}: {_short(error)}; the module must be importable where the driver runs: put its "
            "folder on PYTHONPATH"
        ) from error
    if not isinstance(filter, Filter):
        raise ConfigError(f"synthesis.filters: {name} is not a montessori_core.synthesis.filters.filter.Filter")
    if filter.name in REGISTRY or not re.fullmatch(r"\w{1,40}", filter.name):
        raise ConfigError(
            f"synthesis.filters: {name}: its name {filter.name!r} is taken or not valid; use up to 40 letters, digits and '_'"
        )
    return filter


def _open(entry: FilterSettings, context: Context) -> tuple[str, Filter, Reject]:
    """Return how the configuration names a filter, the filter, and its opened function."""
    filter = find_filter(entry.name)
    if not isinstance(entry, OwnFilter):
        return entry.name, filter, filter.open(entry, context)
    try:
        settings = parse(filter.settings, entry.settings, f"synthesis.filters: {entry.name}: the mapping settings")
        return entry.name, filter, filter.open(settings, context)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"synthesis.filters: {entry.name} cannot be opened: {_short(error)}; correct its settings or its module"
        ) from error


def _reason(label: str, reject: Reject, candidate: Candidate) -> str | None:
    try:
        reason = reject(candidate)
    except Exception as error:
        raise UserError(
            f"synthesis.filters: {label} failed with {_short(error)} on the instruction {candidate.instruction[:200]!r}; "
            "correct its module, or remove the filter"
        ) from error
    if reason is None:
        return None
    if not isinstance(reason, str) or not reason.strip() or "\n" in reason or len(reason) > _LONGEST_REASON:
        raise UserError(
            f"synthesis.filters: {label} gave {reason!r:.200} on the instruction {candidate.instruction[:200]!r}; it must "
            f"return None, or a reason of one line and at most {_LONGEST_REASON} characters"
        )
    return reason


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def check_filters(settings: Synthesis, seed_pool: Sequence[Task]) -> list[str]:
    """Open the filters and try them on seeds; return a warning if they reject more than half of these.

    Raises:
        UserError: a filter cannot be opened, or fails on a seed.
    """
    filters = OpenFilters(settings)
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
    raw_outputs: Sequence[str], prompts: Sequence[Prompt], style: str, keep_newlines: bool, filters: OpenFilters
) -> list[Verdict]:
    """Extract the instructions of candidates and filter them in order.

    Args:
        raw_outputs: [candidates] outputs of the teacher.
        prompts: [candidates] their prompts.
        style: the teacher's prompt style.
        keep_newlines: see `config.Synthesis`.
        filters: the filters, which remember the instructions that passed.
    """
    verdicts = []
    for raw_output, prompt in zip(raw_outputs, prompts, strict=True):
        instruction = extract_instruction(raw_output, style, keep_newlines)
        if not instruction:
            verdicts.append(Verdict(instruction, NO_TAGS if instruction is None else EMPTY))
            continue
        demonstrations = tuple(task.instruction for task in prompt.demonstrations)
        verdicts.append(Verdict(instruction, filters.judge(Candidate(instruction, demonstrations))))
    return verdicts


def funnel(instructions: pa.Table) -> dict[str, int]:
    """Count the candidates of an instruction table, those rejected for each reason, and those kept.

    Reasons are in the order of extraction, the shipped filters, the user's filters, and responses.
    """
    reasons = Counter(reason for reason in instructions["rejection"].to_pylist() if reason is not None)
    rejected = {reason: reasons[reason] for reason in sorted(reasons, key=_place)}
    return {"candidates": instructions.num_rows, **rejected, "kept": instructions.num_rows - reasons.total()}


def _place(rejection: str) -> tuple[int, str]:
    """Return a sort key: the place in the funnel, then the text."""
    order = [*_BEFORE, *REGISTRY, "", *_AFTER]
    name = rejection.partition(":")[0]
    return order.index(name if name in order else ""), rejection
