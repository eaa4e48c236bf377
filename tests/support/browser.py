"""The browser of the tests."""

import shutil
import subprocess
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from support import ROOT

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """Headless Chromium. Tests fail if it is missing and cannot be installed."""
    from playwright.sync_api import sync_playwright

    script = ROOT / "tests" / "support" / "install_chromium.sh"
    installation = subprocess.run([script], capture_output=True, text=True)
    if installation.returncode:
        pytest.fail(f"these tests need Chromium:\n{installation.stderr.strip()}", pytrace=False)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield running
        running.close()
