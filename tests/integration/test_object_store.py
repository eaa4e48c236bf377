"""Data and results on S3: a local server that speaks its protocol."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from moto.moto_server.threaded_moto_server import ThreadedMotoServer

from montessori_core.config import DataSource
from montessori_core.data.sources import read_tasks
from montessori_core.errors import DataError
from support.reports import write_run
from support.runs import invoke

ROWS = [{"instruction": f"Name river {number}.", "output": f"River {number}."} for number in range(20)]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[s3fs.S3FileSystem]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "me",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    system.makedirs("bucket", exist_ok=True)  # the server keeps its buckets for the process
    yield system
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read(path: str) -> list[dict[str, str]]:
    tasks = read_tasks(DataSource(path=path), "references", with_response=True)
    return [{"instruction": task.instruction, "output": task.response} for task in tasks]


def test_rows_on_s3_are_read(store: s3fs.S3FileSystem, tmp_path: Path) -> None:
    store.pipe("bucket/set/part-0.jsonl", lines(ROWS[:12]))
    store.pipe("bucket/set/part-1.jsonl", lines(ROWS[12:]))
    for path in ("s3://bucket/set", "s3://bucket/set/part-*.jsonl"):
        assert read(path) == ROWS, path
    code, output = invoke("data", "check", "s3://bucket/set", cwd=tmp_path)
    assert code == 0, output
    assert "20 rows" in output
    for path, message in (
        ("s3://bucket/none.jsonl", "s3://bucket/none.jsonl: cannot be read"),
        ("s3://absent/set", "s3://absent/set: cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            read(path)


def test_pool_on_s3_is_selected_from(store: s3fs.S3FileSystem, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [row | {"influence": n * 7 % 20} for n, row in enumerate(ROWS)]
    store.pipe("bucket/pools/test-0.jsonl.gz", gzip.compress(lines(rows[:8])))
    store.pipe("bucket/pools/train-1.jsonl.gz", gzip.compress(lines(rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pool.parquet")
    store.put(str(tmp_path / "pool.parquet"), "bucket/pool.parquet")
    table = write_run(tmp_path / "run") / "iteration-1" / "influence.parquet"
    store.put(str(table), "bucket/influence.parquet")
    for number, pool in enumerate(("s3://bucket/pools", "s3://bucket/pools/train-*", "s3://bucket/pool.parquet")):
        out = tmp_path / f"{number}.jsonl"
        code, output = invoke("select", pool, "--k", "2", "--output", out.name, cwd=tmp_path)
        assert code == 0, output
        chosen = [json.loads(line) for line in out.read_text().splitlines()]
        assert sorted(row["influence"] for row in chosen) == [18, 19], pool
    for pool, message in (
        (["s3://bucket/pool.parquet", "--by", "art"], "s3://bucket/pool.parquet: no column 'art'"),
        (["s3://bucket/none.jsonl"], "s3://bucket/none.jsonl: cannot be read"),
        (["s3://bucket/pools", "--to", "messages"], "s3://bucket/pools: only the texts of an influence table"),
        (["s3://bucket/influence.parquet"], "s3://bucket/influence.parquet: an influence table has no texts"),
        (["s3://bucket/pool.parquet", "s3://bucket/other.parquet"], "only a single pool is read from a URL"),
    ):
        code, output = invoke("select", *pool, "--k", "2", "--output", "other.jsonl", cwd=tmp_path)
        assert code == 1
        assert message in " ".join(output.split())


def test_rows_on_s3_without_credentials_are_refused(store: s3fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    store.pipe("bucket/rows.jsonl", lines(ROWS))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError, match=r"s3://bucket/rows.jsonl: cannot be read .*credentials"):
        read("s3://bucket/rows.jsonl")


def test_run_is_pushed_to_s3_and_read_back(store: s3fs.S3FileSystem, tmp_path: Path) -> None:
    run = write_run(tmp_path / "trial", texts=["words " * 20_000])
    to = ("--to", "s3://bucket/results/trial")
    code, output = invoke("push", str(run), *to, cwd=tmp_path)
    assert code == 0, output
    report = store.cat_file("bucket/results/trial/report.html")
    assert report.startswith(b"<!DOCTYPE html>")
    assert report.rstrip().endswith(b"</html>")
    assert len(report) > 10_000_000  # sent in several parts
    assert read("s3://bucket/results/trial/data/training/*.parquet")
    code, output = invoke("push", str(run), *to, cwd=tmp_path)
    assert code == 0, output
    assert "nothing copied" in " ".join(output.split())
    code, output = invoke("push", str(run), "--to", "s3://absent/trial", cwd=tmp_path)
    assert code == 1
    assert "s3://absent/trial" in output
    assert "Traceback" not in output
