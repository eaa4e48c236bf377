"""The teacher's prompt p, before the chat template. `montessori_core.synthesis.strategies` makes prompts."""

from dataclasses import dataclass

from montessori_core.config import Synthesis
from montessori_core.data.sources import Task

OPEN, CLOSE = "<instruction>", "</instruction>"
_MAX_REPETITION_PENALTY = 1.2


@dataclass(frozen=True)
class Prompt:
    """A prompt before the chat template.

    Attributes:
        id: 'p' and its number.
        demonstrations: tasks or passages in its text.
        text: what the teacher reads.
        passage: what the answerer sees before the instruction; empty if it sees the instruction alone.
    """

    id: str
    demonstrations: tuple[Task, ...]
    text: str
    passage: str = ""


def check_decoding(settings: Synthesis) -> list[str]:
    """Return a warning if the repetition penalty suppresses the tag that an instruction must end with."""
    penalty = settings.instruction.repetition_penalty
    if penalty <= _MAX_REPETITION_PENALTY or settings.strategy.name == "magpie":  # whose instructions have no tags
        return []
    return [
        f"synthesis.instruction.repetition_penalty is {penalty:g}: it also counts the prompt, which has {CLOSE}; few outputs "
        f"will end with it and be accepted. Set it to {_MAX_REPETITION_PENALTY:g} or less"
    ]
