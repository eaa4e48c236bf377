"""What errors about memory and time tell a user to type."""

import re
from operator import attrgetter
from pathlib import Path

import pytest

from cluster.retry import REMEDIES, gpu_memory_remedy
from montessori_core.config import Resources, StageResources, parse_experiment, read_experiment, write_yaml
from montessori_core.errors import UserError
from tasks.changed_settings import changed_settings

KINDS = sorted(StageResources.model_fields.keys() - {"judging"})  # those jobs ask an endpoint


@pytest.mark.parametrize("kind", [*KINDS, *REMEDIES])
def test_settings_of_remedies_may_change_in_a_run(kind: str, tmp_path: Path) -> None:
    text = gpu_memory_remedy(kind) if kind in KINDS else REMEDIES[kind].replace("STAGE", "influence")
    config = tmp_path / "config.yaml"
    write_yaml(parse_experiment({"teacher": {"model": "t"}, "student": {"model": "s"}}, "test"), config)
    before = read_experiment(config)
    settings = re.findall(r"\b([a-z_]+(?:\.[a-z_]+)+)(?:=([\w.]*\w))?", text.replace("RUN_DIR/config.yaml", ""))
    assert settings or kind == "file_system"
    for name, value in settings:
        if isinstance(attrgetter(name)(before), Resources):
            continue  # for one of its settings
        smaller = "64" if name.endswith("max_length") else "1"
        new = smaller if value in ("", "GB", "MINUTES") else value
        experiment = read_experiment(config, (f"{name}={new}",))
        if name.startswith("student."):
            with pytest.raises(UserError, match="this run was started with another configuration"):
                changed_settings(before, experiment, config)
        else:
            changed_settings(before, experiment, config)
