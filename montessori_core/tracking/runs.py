"""Runs of experiment trackers: their names and ids, and what has been logged to them.

The folder `tracking` of a run has `tracking.json` (trackers, id, and the run's folder), a state file for each tracked
run, and `problems.json` (what each tracker could not do). Servers and keys come from the environment alone: no file has them.
"""

import os
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from montessori_core.errors import DataError
from montessori_core.files import hash_json, is_copy, read_json, write_json
from montessori_core.layout import TRACKING

ITERATIONS = "iterations"
"""The part of a run that has the numbers of its iterations."""
_STATE = "state"
_SECRET = re.compile(r"KEY|TOKEN|PASSWORD|SECRET")
_SHORTEST_SECRET = 6  # characters: shorter values would remove words from messages


@dataclass(frozen=True)
class TrackedRun:
    """A run in the trackers: a training, or the numbers of a run's iterations.

    Attributes:
        folder: folder `tracking` of the run.
        trackers: their names.
        group: name of all tracked runs of the run: its own name and a part of its id.
        id: of this tracked run; the same after a restart, and used by no other.
        part: `ITERATIONS`, or a training's stage and a hash of what decides its result.
    """

    folder: Path
    trackers: tuple[str, ...]
    group: str
    id: str
    part: str

    @staticmethod
    def of(file: Path, part: str) -> "TrackedRun":
        """Return a part of the run whose `tracking.json` is `file`."""
        content = read_json(file)
        if content is None:
            raise DataError(f"{file}: missing or damaged; resume the run, which writes it again")
        return TrackedRun(
            file.parent, tuple(content["trackers"]), content["group"], hash_json([content["id"], part])[:16], part
        )

    @property
    def name(self) -> str:
        """Its name in a tracker's project."""
        return f"{self.group}/{self.part}"

    @property
    def state(self) -> Path:
        """The file that says what has been logged: a mapping for each tracker."""
        return self.folder / _STATE / f"{self.part.replace('/', '--')}.json"

    def read_state(self, tracker: str) -> dict[str, Any]:
        """Return what has been logged to a tracker."""
        state: dict[str, Any] = (read_json(self.state) or {}).get(tracker, {})
        return state

    def update_state(self, tracker: str, **changes: Any) -> None:
        """Change what has been logged to a tracker."""
        self.state.parent.mkdir(parents=True, exist_ok=True)
        content = read_json(self.state) or {}
        write_json(content | {tracker: content.get(tracker, {}) | changes}, self.state, durable=False)


def prepare_tracking(folder: Path, name: str, trackers: Sequence[str]) -> Path:
    """Write the file `tracking.json` of a run, whose id stays the same; return its path.

    A copy of a run gets an id of its own: trackers would write its numbers over those of the original.

    Args:
        folder: folder of the run.
        name: of the run.
        trackers: their names.
    """
    file = folder / TRACKING / "tracking.json"
    before = read_json(file) or {}
    if is_copy(folder, before.get("folder")):
        before = {}
        shutil.rmtree(file.with_name(_STATE), ignore_errors=True)  # of the original's tracked runs
    id = before.get("id") or uuid.uuid4().hex
    content = {
        "id": id,
        "group": before.get("group") or f"{name}-{id[:6]}",
        "trackers": list(trackers),
        "folder": str(folder.resolve()),
    }
    if content != before:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(content, file)
    return file


def record_problem(file: Path, tracker: str, error: Exception) -> None:
    """Record in `problems.json` that a tracker failed, unless a problem with it is known; `file` is `tracking.json`."""
    problems = read_json(_problems(file)) or {}
    if tracker in problems:
        return
    with suppress(OSError):  # a full disk is the run's problem, not the tracker's
        write_json(problems | {tracker: {"problem": describe(error), "shown": False}}, _problems(file))


def new_problems(file: Path) -> dict[str, str]:
    """Return the problems that were not returned before, by tracker; `file` is `tracking.json`."""
    problems: Mapping[str, Any] = read_json(_problems(file)) or {}
    new = {tracker: entry["problem"] for tracker, entry in problems.items() if not entry["shown"]}
    if new:
        shown = {tracker: entry | {"shown": True} for tracker, entry in problems.items()}
        write_json(shown, _problems(file))
    return new


def forget_problems(file: Path) -> None:
    """Remove the problems of earlier drivers; `file` is `tracking.json`."""
    _problems(file).unlink(missing_ok=True)


def describe(error: Exception) -> str:
    """Return an error in a line, without the secrets of the environment and of URLs."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    secrets = [value for name, value in os.environ.items() if _SECRET.search(name) and len(value) >= _SHORTEST_SECRET]
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return re.sub(r"//[^/\s@]+@", "//", text)[:300]


def _problems(file: Path) -> Path:
    return file.with_name("problems.json")
