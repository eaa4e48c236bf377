"""Names of reference sets."""

import pytest

from flows.measurement import Measurement, names_of_targets
from montessori_core.config import Cluster, DataSource, Influence, Student


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["coding.jsonl", "builtin/maths", "openai/gsm8k"], ["coding", "maths", "gsm8k"]),
        (["a/set.jsonl.gz", "b/set.parquet", "c/set.json"], ["set", "set-2", "set-3"]),
        (["a-2.jsonl", "x/a.jsonl", "y/a.jsonl", "z/a.jsonl"], ["a-2", "a", "a-3", "a-4"]),
        (["s3://bucket/päter noster", "..."], ["p-ter-noster", "set"]),
    ],
)
def test_reference_sets_have_different_names(paths: list[str], names: list[str]) -> None:
    first, *others = (DataSource(path=path) for path in paths)
    measurement = Measurement(
        Student(model="student"), None, first, first, Influence(), "student", Cluster(), targets=tuple(others)
    )
    assert names_of_targets(measurement) == names
