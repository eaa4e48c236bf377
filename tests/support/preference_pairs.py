"""A few preference pairs, as rows of a teacher update."""

from montessori_core.program import Row

PAIRS: list[Row] = [
    {
        "prompt": f"Tasks:\n<instruction>Count to {i}.</instruction>\n<instruction>",
        "chosen": f"Name {i} rivers and a lake.</instruction>",
        "rejected": f"Stop {i}.</instruction>",
    }
    for i in range(8)
]
