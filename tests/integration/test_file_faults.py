"""A whole run on a file system that fails: it ends with the same tables, or stops with an error and can be resumed."""

import errno
import shutil
from pathlib import Path

import pytest

from support import file_faults
from support.file_faults import faults
from support.runs import call, configuration, digests, left_over

pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
    pytest.mark.slow,
    pytest.mark.timeout(1800),
]
READ = ("config.yaml", "rows.parquet", "part-", "ledger.json", "influence.parquet", "model.safetensors")

libraries = file_faults.libraries


@pytest.mark.guarantee("stale file handles")
def test_run_survives_failing_files(finished_run: Path, talking_llama: Path, libraries: Path, tmp_path: Path) -> None:
    """Opening each kind of file fails once. After an error, the run is resumed, as users do."""
    config, root = configuration(tmp_path, talking_llama), tmp_path / "runs"
    variables = faults(root, libraries, "open", READ, errno.ESTALE, 1)
    code, output = call("run", str(config), cwd=tmp_path, **variables)
    stops = 0
    while code != 0:
        stops += 1
        assert stops <= len(READ), output
        assert "error: " in output, output
        assert "Traceback" not in output, output
        code, output = call("run", str(config), cwd=tmp_path, **variables)
    assert list((tmp_path / "tokens").iterdir()) == []
    assert digests(root / "tiny") == digests(finished_run / "runs" / "tiny")
    assert not left_over(tmp_path)
