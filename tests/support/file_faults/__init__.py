"""Libraries that make calls of the C library fail, or see changes of files late."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the libraries."""
    built = tmp_path_factory.mktemp("libraries")
    for source in Path(__file__).parent.glob("*.c"):
        library = built / f"{source.stem}.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl", "-lpthread"], check=True)
    return built


def faults(root: Path, libraries: Path, call: str, names: Sequence[str], error: int, count: int) -> dict[str, str]:
    """Return the variables with which calls on files fail, `count` times for each part of a name."""
    tokens = root.parent / "tokens"
    tokens.mkdir()
    for name in names:
        for number in range(1, count + 1):
            (tokens / f"{name}-{number}").touch()
    values = {"ROOT": root, "NAME": ",".join(names), "CALL": call, "ERROR": error, "TOKENS": tokens}
    return {"LD_PRELOAD": str(libraries / "failing_files.so")} | {
        f"FAULT_{key}": str(value) for key, value in values.items()
    }
