"""The doctor's report of a node."""

import json
from pathlib import Path

import pytest

from cluster.doctor import check_report, needs_compiler
from cluster.doctor_jobs import open_node_report
from montessori_core.config import Resources

FAILING = "#!/bin/sh\necho '<stdin>:1:10: fatal error: Python.h: No such file or directory' >&2; exit 1\n"


@pytest.mark.parametrize(
    ("compilers", "good", "seen"),
    [
        ({}, False, "no gcc or clang on PATH, and CC is not set"),
        ({"cc": "#!/bin/sh\n"}, False, "no gcc or clang on PATH, and CC is not set"),  # Triton looks for no cc
        ({"gcc": "#!/bin/sh\n"}, True, "/gcc"),
        ({"gcc": FAILING, "clang": "#!/bin/sh\n"}, False, "fatal error: Python.h: No such file or directory"),
        ({"CC": "missing-gcc"}, False, "missing-gcc: No such file or directory"),
    ],
    ids=["none", "cc alone", "gcc", "no headers", "wrong CC"],
)
def test_doctor_reports_compiler_of_gpu_jobs(
    compilers: dict[str, str], good: bool, seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, content in compilers.items():
        if name == "CC":
            monkeypatch.setenv("CC", content)
        else:
            (tmp_path / name).write_text(content)
            (tmp_path / name).chmod(0o755)

    def compilers_of(stage: str, gpus: int) -> list[tuple[bool | None, str]]:
        resources, file = Resources(gpus_per_node=gpus), tmp_path / "report.json"
        settings = {"packages": {}, "compiler": needs_compiler(stage, resources)}
        open_node_report(settings, {"token": tmp_path / "token"})([], file, lambda *_: None)
        findings = check_report(stage, json.loads(file.read_text()), "token", resources)
        return [(finding.good, finding.seen) for finding in findings if "C compiler" in finding.check]

    [(passed, text)] = compilers_of("training", 1)
    assert passed is good
    assert text.endswith(seen)
    assert compilers_of("training", 0) == compilers_of("influence", 1) == []
