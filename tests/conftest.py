"""Test tiers and common settings.

`make test` runs tests without the `slow` mark; `--all` runs all tests. A test given by its id always runs.
"""

import atexit
import gc
import os
import shutil
import signal
import tempfile

import pytest
from hypothesis import settings

pytest_plugins = ["support.models", "support.browser", "support.finished_run", "support.interrupted"]

gc.disable()  # until all tests are collected: a third of the time of the imports
if "PYTEST_XDIST_WORKER" not in os.environ:  # the user's Prefect server and database are none of the tests' business
    for variable in [variable for variable in os.environ if variable.startswith("PREFECT_")]:
        del os.environ[variable]
    os.environ["PREFECT_HOME"] = tempfile.mkdtemp(prefix="montessori-prefect-")
    atexit.register(shutil.rmtree, os.environ["PREFECT_HOME"], ignore_errors=True)
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tests are of the CPU, also where there are GPUs
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # other tests run on the other cores; jobs have threads of their own
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads would slow down other tests

# Hypothesis draws the same examples each time; MONTESSORI_TEST_SEED draws others.
_DERANDOMIZE = "MONTESSORI_TEST_SEED" not in os.environ
settings.register_profile("quick", deadline=None, derandomize=_DERANDOMIZE, max_examples=25)
settings.register_profile("all", deadline=None, derandomize=_DERANDOMIZE, max_examples=500)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the slow tests, too, and fuzz with 500 examples")


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("all" if config.getoption("--all") else "quick")
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # A script started pytest with &; commands that tests start and interrupt would ignore SIGINT, too.
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionstart() -> None:
    """Print no colours in the commands that tests run; pytest itself has read its variables by now."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "CLICOLOR_FORCE", "PY_COLORS"):
        os.environ.pop(name, None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect slow tests, unless their ids are given."""
    if config.getoption("--all"):
        return
    named = [argument for argument in config.args if "::" in argument]
    slow = [item for item in items if item.get_closest_marker("slow") and not _is_named(item, named)]
    items[:] = [item for item in items if item not in slow]
    config.hook.pytest_deselected(items=slow)


def pytest_collection_finish() -> None:
    """Leave the imported libraries, millions of objects, out of garbage collection."""
    gc.enable()
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


def _is_named(item: pytest.Item, named: list[str]) -> bool:
    return any(item.nodeid.endswith(name[name.index("::") :]) or name in item.nodeid for name in named)
