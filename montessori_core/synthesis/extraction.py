"""Extract the instruction from a teacher's raw output."""

import re

from montessori_core.synthesis.prompts import CLOSE, OPEN

_TAGGED = re.compile(f"{re.escape(OPEN)}((?:(?!{re.escape(OPEN)}).)*?){re.escape(CLOSE)}", re.DOTALL)
_OTHER_TAG = re.compile(r"</\w+>\s*$")


def extract_instruction(raw_output: str, style: str, keep_newlines: bool) -> str | None:
    """Return the last tagged instruction in a teacher's output, whitespace collapsed; None if there is none.

    In completion style the prompt ends with the opening tag, so the output starts inside the tags.
    """
    instructions = _TAGGED.findall(OPEN + raw_output if style == "completion" else raw_output)
    return collapse_blanks(instructions[-1], keep_newlines) if instructions else None


def close_output(raw_output: str, finish_reason: str) -> str:
    """Return an output in completion style, with the closing tag if the teacher ended the output without it.

    Chat models often end their turn after a complete instruction. An output that was cut, or that ends with another closing
    tag, stays as it is.

    Args:
        raw_output: the output, which starts inside the tags.
        finish_reason: 'stop' or 'length'.
    """
    ended = finish_reason == "stop" and CLOSE not in raw_output and not _OTHER_TAG.search(raw_output)
    return raw_output + CLOSE if ended else raw_output


def collapse_blanks(text: str, keep_newlines: bool) -> str:
    """Trim, and collapse whitespace; `keep_newlines` keeps line breaks and indentation."""
    if not keep_newlines:
        return " ".join(text.split())
    lines = [re.match(r"[ \t]*", line).group() + " ".join(line.split()) for line in text.splitlines()]  # type: ignore[union-attr]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in lines)).strip()
