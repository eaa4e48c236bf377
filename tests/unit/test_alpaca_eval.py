"""Win rates, on simulated data and on published annotations."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit

from montessori_core.data.tables import PAIRWISE, table_from_rows
from montessori_core.errors import DataError
from montessori_core.evaluation.alpaca_eval import (
    WinRates,
    comparisons,
    length_controlled_win_rate,
    read_difficulties,
    read_outputs,
    summarize,
)
from montessori_core.evaluation.scores import win_rate_scores
from montessori_core.evaluation.statistics import mean_and_error

SHARED = Path(os.environ.get("MONTESSORI_SHARED_DATA", "no folder named"))
PUBLIC = SHARED / "alpaca_eval_annotations_FuseChat-Llama-3.2-1B-Instruct.jsonl"


@pytest.mark.skipif(not PUBLIC.exists(), reason="MONTESSORI_SHARED_DATA names no folder with the published annotations")
def test_published_annotations_give_published_rates() -> None:
    annotations = [json.loads(line) for line in PUBLIC.read_text().splitlines()]
    preferences = [one["preference"] - 1 for one in annotations]
    lengths, others = ([one[name] for one in annotations] for name in ("len_2", "len_1"))
    rate, error = mean_and_error(np.array(preferences))
    assert (round(100 * rate, 2), round(100 * error, 2)) == (29.92, 1.39)
    controlled, _ = length_controlled_win_rate(preferences, lengths, others)
    assert 100 * controlled == pytest.approx(
        26.03, abs=0.02
    )  # published: 25.27, with difficulties and adversarial baselines


def preferences_for(
    seed: int, examples: int, theta: float, phi: float, psi: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return preferences drawn from the published model, lengths (the model's answers are longer), and difficulties."""
    draw = np.random.default_rng(seed)
    others = draw.integers(500, 3000, examples)
    longer = draw.normal(400, 800, examples).round().astype(int)
    difficulty = draw.normal(0, 1, examples)
    logits = theta + phi * np.tanh(longer / longer.std(ddof=1)) + psi * difficulty
    return expit(logits), others + longer, others, difficulty


@pytest.mark.parametrize("phi", [2.0, -2.0])
def test_length_preference_gives_rate_one_half(phi: float) -> None:
    preferences, lengths, others, _ = preferences_for(0, 1000, theta=0.0, phi=phi)
    plain, _ = mean_and_error(preferences)
    controlled, _ = length_controlled_win_rate(preferences, lengths, others)
    assert abs(plain - 0.5) > 0.1
    assert abs(controlled - 0.5) < 0.002


def test_strength_beyond_length_is_recovered() -> None:
    preferences, lengths, others, difficulty = preferences_for(1, 1000, theta=-1.0, phi=1.5, psi=1.0)
    controlled, _ = length_controlled_win_rate(preferences, lengths, others, difficulty)
    assert abs(controlled - expit(-1.0 + difficulty).mean()) < 0.002
    assert abs(controlled - preferences.mean()) > 0.05


@pytest.mark.parametrize("with_difficulty", [False, True])
def test_swapped_models_have_complementary_rates(with_difficulty: bool) -> None:
    preferences, lengths, others, difficulty = preferences_for(2, 400, theta=-0.7, phi=1.0, psi=0.5)
    known = difficulty if with_difficulty else None
    rate, error = length_controlled_win_rate(preferences, lengths, others, known)
    turned, turned_error = length_controlled_win_rate(1 - preferences, others, lengths, known)
    assert turned == pytest.approx(1 - rate, abs=1e-4)
    assert turned_error == pytest.approx(error, abs=1e-4)


@pytest.mark.parametrize("difference", [0, 250])
def test_equal_lengths_give_plain_win_rate(difference: int) -> None:
    preferences = np.repeat([1.0, 0.5, 0.0], [100, 100, 500])
    np.random.default_rng(3).shuffle(preferences)
    lengths = np.full(700, 900)
    controlled = length_controlled_win_rate(preferences, lengths + difference, lengths)
    assert controlled == pytest.approx(mean_and_error(preferences), abs=0.005)


def test_standard_error_is_spread_over_resamples() -> None:
    draw, found = np.random.default_rng(0), []
    for seed in range(30):
        probabilities, *known = preferences_for(seed, 250, theta=-0.8, phi=1.5, psi=1.0)
        wins = (draw.random(250) < probabilities).astype(float)
        found.append(length_controlled_win_rate(wins, *known))
    rates, errors = np.array(found).T
    assert errors.mean() == pytest.approx(rates.std(ddof=1), rel=0.3)


@pytest.mark.parametrize("preference", [0.0, 1.0])
def test_rate_of_all_wins_or_losses_is_extreme(preference: float) -> None:
    _, lengths, others, difficulty = preferences_for(4, 100, theta=0.0, phi=0.0)
    controlled, error = length_controlled_win_rate([preference] * 100, lengths, others, difficulty)
    assert abs(controlled - preference) < 0.01
    assert 0 <= error < 0.01


def test_summary_rates_readable_preferences() -> None:
    outcomes = ["win"] * 30 + ["loss"] * 50 + ["unparsed"] * 7 + ["tie"] * 20
    worth = {"win": 1.0, "loss": 0.0, "tie": 0.5, "unparsed": None}
    draw = np.random.default_rng(5)
    lengths, others = draw.integers(10, 3000, (2, len(outcomes))).tolist()
    difficulty = draw.normal(size=len(outcomes)).tolist()
    table = table_from_rows(
        [
            {
                "question_id": str(number),
                "outcome": outcome,
                "preference": worth[outcome],
                "characters": lengths[number],
                "other_characters": others[number],
            }
            for number, outcome in enumerate(outcomes)
        ],
        PAIRWISE,
    )
    summary = summarize(table, difficulty)
    judged = [number for number, outcome in enumerate(outcomes) if outcome != "unparsed"]
    preferences = [worth[outcomes[number]] for number in judged]
    controlled = length_controlled_win_rate(
        preferences, *([values[number] for number in judged] for values in (lengths, others, difficulty))
    )
    assert (summary.wins, summary.ties, summary.losses, summary.unparsed) == (30, 20, 50, 7)
    assert (summary.win_rate, summary.win_rate_error) == mean_and_error(np.array(preferences))
    assert summary.win_rate == 0.4
    assert (summary.length_controlled, summary.length_controlled_error) == controlled
    assert [(one["examples"], one["unparsed"]) for one in win_rate_scores("alpaca_eval", summary)] == [(100, 7)] * 2
    nothing = [number for number, outcome in enumerate(outcomes) if outcome == "unparsed"]
    assert summarize(table.take(nothing)) == WinRates(0, 0, 0, 7, None, None, None, None)
    with pytest.raises(DataError, match="805 difficulties for 107 questions"):
        summarize(table, [0.0] * 805)


ENTRIES = [
    {"instruction": "Name a river.", "output": "The Danube.", "generator": "m", "dataset": "d", "other": 1},
    {"instruction": "Say {nothing}.", "output": ""},
]


def test_outputs_are_read_from_json_or_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ENTRIES, indent=1))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ENTRIES)))
    outputs = read_outputs(tmp_path / "a.json")
    assert outputs == read_outputs(tmp_path / "a.jsonl")
    assert [(one.instruction, one.output, one.generator) for one in outputs] == [
        ("Name a river.", "The Danube.", "m"),
        ("Say {nothing}.", "", ""),
    ]
    mine = {one.instruction: one.output for one in outputs}
    rows = comparisons(mine, dict(reversed({one: f"other {one}" for one in mine}.items())))
    assert rows[0] == {
        "question_id": "00000",
        "instruction": "Name a river.",
        "answer": "The Danube.",
        "other": "other Name a river.",
    }
    with pytest.raises(DataError, match="1 instructions have no answer of the other, e.g. 'Say {nothing}.'"):
        comparisons(mine, {"Name a river.": "x"})
    with pytest.raises(DataError, match="1 instructions have no answer of the model"):
        comparisons({"Name a river.": "x"}, mine)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"instruction": "x", "output": "y"}', "a.json: expected a list of objects, found dict"),
        ("a.json", '{"instruction": "x"}\n{}', "a.json, line 2, column 1: not valid JSON .* must be named .jsonl"),
        ("a.json", "[]", "a.json: no entries"),
        ("a.json", json.dumps([ENTRIES[0], {"output": "y"}]), "a.json, entry 2: field instruction: Field required"),
        ("a.json", json.dumps([ENTRIES[0], ENTRIES[0]]), "entry 2: field instruction: as in entry 1; remove one"),
        ("a.jsonl", json.dumps(ENTRIES[0] | {"output": 3}), "a.jsonl, line 1: field output: .*valid string"),
        ("a.jsonl", json.dumps(ENTRIES[0] | {"instruction": "\n"}), "a.jsonl, line 1: field instruction: "),
        ("a.jsonl", "\n3", "a.jsonl, line 2: .* an entry has the fields instruction, output"),
        ("a.txt", "", "a.txt: no entries"),
    ],
)
def test_invalid_outputs_are_named_with_place(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_outputs(tmp_path / name)
    with pytest.raises(DataError, match="check the path"):
        read_outputs(tmp_path / f"missing-{name}")


def test_difficulties_are_sorted_by_index(tmp_path: Path) -> None:
    path = tmp_path / "difficulty.csv"
    path.write_text(",instruction_difficulty\n1,-0.5\n0,2\n2,1e-3\n")
    assert read_difficulties(path) == [2.0, -0.5, 0.001]
    for content, message in {
        ",d\n0,1\n2,1\n": "indexes must be 0 to 1",
        ",d\n0,1\nx,1\n": "line 3: expected an index and a number",
        ",d\n0\n": "line 2: expected an index",
        ",d\n0,nan\n": "line 2: not finite",
        ",d\n0,1\n0,1\n": "line 3: .* index 0 occurs twice",
    }.items():
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            read_difficulties(path)
