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
candidates must get the same reasons.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from montessori_core.config import Section


@dataclass(frozen=True)
class Candidate:
    """An instruction of a teacher, and the demonstrations of its prompt."""

    instruction: str
    demonstrations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Context:
    """What a filter knows besides its settings.

    Attributes:
        english: whether the instructions are in English (`synthesis.language`).
        accepted: instructions that all filters accepted, in order; it grows with each.
    """

    english: bool
    accepted: Sequence[str]


Reject = Callable[[Candidate], str | None]
"""Returns the reason why an instruction is rejected, a few words that do not depend on its text; None if it passes."""


@dataclass(frozen=True)
class Filter:
    """A filter of instructions.

    Attributes:
        name: name in the table of instructions and in the funnel.
        description: one line for the list of filters.
        open: returns the filter's function for its settings; called once per set of examples.
        settings: type that validates its settings; `Section` itself has none.
    """

    name: str
    description: str
    open: Callable[[Any, Context], Reject]
    settings: type[Section] = Section
