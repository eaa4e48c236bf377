"""Controls of `montessori select`: random rows, and other rows of the same lengths."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from montessori_core.selection.choose import Choice, choose
from montessori_core.selection.lengths import match_lengths
from montessori_core.selection.pools import FilesPool
from support.pools import ListPool
from support.runs import invoke


def test_controls_are_seeded_and_have_size_or_lengths() -> None:
    draw = random.Random(1)
    tokens = [draw.randint(1, 40) for _ in range(200)]
    pool = ListPool([{"s": -i, "response_tokens": number} for i, number in enumerate(tokens)])
    choice = Choice(("s",), rows=20)
    draws = [choose(pool, choice, "random", seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert all(len(set(drawn)) == 20 for drawn in draws)
    assert Counter(i < 20 for i in choose(pool, Choice(("s",), rows=100), "random"))[True] < 18
    matched = choose(pool, choice, "length_matched", 0)
    assert not set(matched) & set(range(20))
    errors = [abs(a - b) for a, b in zip(sorted(tokens[:20]), sorted(tokens[i] for i in matched), strict=True)]
    assert max(errors) <= 2
    assert matched == choose(pool, choice, "length_matched", 0)


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=30), st.integers(0, 3))
def test_matched_lengths_are_the_nearest(rows: list[tuple[int, bool]], seed: int) -> None:
    lengths, selected = np.array([length for length, _ in rows]), np.array([chosen for _, chosen in rows])
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    free, expected = [place for place in order if not selected[place]], []
    for length in sorted(lengths[selected].tolist(), reverse=True):
        free = free or [place for place in order if selected[place]]
        nearest = min(free, key=lambda place: abs(lengths[place] - length))
        free.remove(nearest)
        expected.append(nearest)
    assert match_lengths(lengths, selected, seed) == expected


@pytest.mark.parametrize(("share", "both"), [("0.5", 0), ("0.8", 6), ("1", 10)])
def test_command_warns_of_selected_rows_in_control(share: str, both: int, tmp_path: Path) -> None:
    rows = [{"text": str(n), "influence": -n, "response_tokens": 5} for n in range(10)]
    (tmp_path / "pool.jsonl").write_text("\n".join(map(json.dumps, rows)))
    select = ("select", "pool.jsonl", "--share", share, "--output")
    _, output = invoke(*select, "best.jsonl", cwd=tmp_path)
    assert "warning" not in output
    code, output = invoke(*select, "control.jsonl", "--control", "length_matched", cwd=tmp_path)
    assert code == 0, output
    best, control = (
        {row["text"] for row in FilesPool(tmp_path / name).rows()} for name in ("best.jsonl", "control.jsonl")
    )
    assert len(best & control) == both
    warning = (
        f"{both} of the {len(best)} rows of the control are selected rows, too: {10 - len(best)} others have a score"
    )
    assert (warning in output) == bool(both)
    assert ("warning" in output) == bool(both)
