"""The interface of a filter: it gives the reason why an instruction is rejected, or None.

Your own filter is a module with a `Filter`; name it in `synthesis.filters` as `module:NAME`:

    from montessori_core.config import Section
    from montessori_core.synthesis.filters.filter import Candidate, Context, Filter, Reject

    class Settings(Section):
        word: str

    def open_polite(settings: Settings, context: Context) -> Reject:
        def reject(candidate: Candidate) -> str | None:
            return None if settings.word in candidate.instruction.lower() else "not polite"

        return reject

    POLITE = Filter("polite", "Instructions that say please.", open_polite, Settings)

The driver applies filters to the output of a stage, so jobs do not import them. A resumed run applies them again: the same
candidates must get the same reasons. A filter that reads `examples` sees the response as well, and is applied after it is
written.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from montessori_core.config import Section


@dataclass(frozen=True)
class Candidate:
    """An instruction of a teacher, the demonstrations of its prompt, and its response once that is written."""

    instruction: str
    demonstrations: tuple[str, ...] = ()
    response: str = ""


@dataclass(frozen=True)
class Context:
    """What a filter knows besides its settings.

    Attributes:
        english: whether the instructions are in English (`synthesis.language`).
        accepted: instructions that all filters of instructions accepted, in order; it grows with each.
        seeds: the instructions of the seed pool.
        measured: results of the filter's jobs by instruction and response (empty for a filter of instructions); it grows
            with each round.
    """

    english: bool
    accepted: Sequence[str]
    seeds: Sequence[str] = ()
    measured: Mapping[tuple[str, str], Any] = field(default_factory=dict)


Reject = Callable[[Candidate], str | None]
"""Returns the reason why an instruction is rejected, a few words that do not depend on its text; None if it passes."""


@dataclass(frozen=True)
class Filter:
    """A filter of instructions or examples.

    Attributes:
        name: name in the table of instructions and in the funnel.
        description: one line for the list of filters.
        open: returns the filter's function for its settings; called once per set of examples.
        settings: type that validates its settings; `Section` itself has none.
        reads: 'instructions', before responses are written, or 'examples', afterwards.
        has_jobs: whether jobs measure what it decides on, see `tasks.filters`; only shipped filters have jobs.
    """

    name: str
    description: str
    open: Callable[[Any, Context], Reject]
    settings: type[Section] = Section
    reads: Literal["instructions", "examples"] = "instructions"
    has_jobs: bool = False
