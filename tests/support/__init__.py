"""Shared parts of tests: models, programs, runs, servers. Test modules import from here, never from each other."""

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
CONFIGS = ROOT / "montessori_core" / "presets"
NO_LIBRARIES = ROOT / "tests" / "support" / "no_libraries"
"""Folder for the path of jobs that need no torch: a warm process starts in a second instead of seven."""
