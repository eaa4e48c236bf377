"""The strategy `magpie`: the teacher gets the beginning of a user's turn alone, and writes what a user would.

With `prompt_style: chat` it is the beginning that the chat template writes (Xu et al., "Magpie", ICLR 2025); with
`completion` it is the plain `User:` of NOMAD (Chen et al., 2024). All prompts are alike; their random numbers differ.
"""

from montessori_core.config import MagpieStrategy
from montessori_core.programs import Form
from montessori_core.synthesis.extraction import collapse_blanks
from montessori_core.synthesis.filtering import UNFINISHED
from montessori_core.synthesis.nomad import NEXT_TURN, USER
from montessori_core.synthesis.strategies.strategy import Draft, Material, Strategy, Write


def _open(settings: MagpieStrategy, material: Material) -> Write:
    beginning = USER if material.style == "completion" else ""
    return lambda draw: Draft(beginning)


def _form(style: str) -> Form:
    return "user_line" if style == "completion" else "user_turn"


def _extract(raw_output: str, finish_reason: str, material: Material) -> str | None:
    """Return the user's turn; None if the token limit cut it."""
    if material.style == "completion":
        turn = NEXT_TURN.split(raw_output, maxsplit=1)
        raw_output, finish_reason = turn[0], "stop" if len(turn) > 1 else finish_reason
    return collapse_blanks(raw_output, material.settings.keep_newlines) if finish_reason == "stop" else None


MAGPIE = Strategy(
    "magpie",
    "What the teacher writes in place of a user, from the bare beginning of a user's turn; no seeds.",
    _open,
    MagpieStrategy,
    form=_form,
    extract=_extract,
    missing=UNFINISHED,
    chat_api=False,
)
