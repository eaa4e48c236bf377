"""The report's lists of texts: their memory follows what is shown, not the size of the run."""

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from montessori_core.formatting import Unit
from montessori_report.run_data import RunData, read_run_data
from montessori_report.sections import examples
from montessori_report.sections.influence import influence_unit
from support.reports import write_run


def repeated(run: RunData, times: int) -> RunData:
    """Return a run of one iteration whose tables have each row several times, with new ids."""

    def repeat(table: pa.Table) -> pa.Table:
        copies = []
        for number in range(times):
            copy = table
            for column in ("example_id", "chosen_id", "rejected_id"):
                if column in table.column_names:
                    ids = pa.array([f"{name}-{number}" for name in table[column].to_pylist()])
                    copy = copy.set_column(copy.column_names.index(column), table.schema.field(column), ids)
            copies.append(copy)
        return pa.concat_tables(copies)

    (iteration,) = run.iterations
    probing = replace(
        iteration.probing,
        instructions=repeat(iteration.probing.instructions),
        examples=repeat(iteration.probing.examples),
    )
    influence = iteration.influence and replace(iteration.influence, table=repeat(iteration.influence.table))
    larger = replace(iteration, probing=probing, influence=influence, preferences=repeat(iteration.preferences))
    return replace(run, iterations=[larger])


def peak_of(show: Callable[[], object]) -> int:
    """Return the most bytes of Python objects that a call holds at once."""
    tracemalloc.start()
    show()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("measured", [True, False])
def test_memory_of_texts_does_not_grow_with_run(
    measured: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples, "EXAMPLES_SHOWN", 50)
    run = read_run_data(write_run(tmp_path / "trial", texts=["words " * 100]))
    unit: Unit = influence_unit([run])
    if not measured:
        run = replace(run, iterations=[replace(run.iterations[0], influence=None)])

    def peaks(of: RunData) -> list[int]:
        (iteration,) = of.iterations
        return [
            peak_of(lambda: examples.examples_of(of, unit)),
            peak_of(lambda: examples.pairs_of(iteration)),
            peak_of(lambda: examples.rejections_of(of.syntheses)),
        ]

    assert examples.examples_of(run, unit).total == 40
    small = peaks(run)
    larger = repeated(run, 200)
    assert examples.examples_of(larger, unit).total == 8000
    assert all(peak < 4 * before + 300_000 for peak, before in zip(peaks(larger), small, strict=True)), peaks(larger)
