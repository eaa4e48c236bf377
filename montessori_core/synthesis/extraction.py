"""Extract the instruction from a teacher's raw output."""

import re

from montessori_core.synthesis.prompts import CLOSE, OPEN

_TAGGED = re.compile(f"{re.escape(OPEN)}((?:(?!{re.escape(OPEN)}).)*?){re.escape(CLOSE)}", re.DOTALL)


def extract_instruction(raw_output: str, style: str, keep_newlines: bool) -> str | None:
    """Return the last tagged instruction in a teacher's output, whitespace collapsed; None if there is none.

    In completion style the prompt ends with the opening tag, so the output starts inside the tags.
    """
    instructions = _TAGGED.findall(OPEN + raw_output if style == "completion" else raw_output)
    return collapse_blanks(instructions[-1], keep_newlines) if instructions else None


def collapse_blanks(text: str, keep_newlines: bool) -> str:
    """Trim, and collapse whitespace; `keep_newlines` keeps line breaks and indentation."""
    if not keep_newlines:
        return " ".join(text.split())
    lines = [re.match(r"[ \t]*", line).group() + " ".join(line.split()) for line in text.splitlines()]  # type: ignore[union-attr]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in lines)).strip()
