"""A study of all methods and one of a user's, at a size for tests."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from flows.methods import REGISTRY
from montessori_core.data.sources import Task
from support import ROOT
from support.judges import JudgeServer
from support.runs import configuration


def conversations(count: int) -> Iterator[Task]:
    things = ["rivers", "stones", "birds", "songs", "trees", "lakes"]
    for number in range(count):
        one, other = things[number % 6], things[(number * 5 + 1 + number // 6) % 6]
        yield Task(f"c{number}", f"Count {number + 2} {one} and {other}.", f"Here are {one}.")


def write_study(folder: Path, model: Path, judge: JudgeServer, **cluster: object) -> None:
    """Write `study.yaml`: all methods and one of a user's, at a size for tests."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "comparing.md").read_text(), re.DOTALL)
    (folder / "own.py").write_text(code.replace('draw="mine"', 'draw="i1-training"'))  # equal to self_instruct
    experiment = yaml.safe_load(configuration(folder, model).read_text())
    experiment["cluster"] |= cluster
    experiment["comparison"] = {"influence_examples": 4, "teacher_checkpoints": 1}
    experiment["judge"] = experiment["strong_teacher"] = {"model": "judge", "base_url": judge.url}
    experiment["synthesis"]["oversampling"] = 3.0  # one round does
    # So few conversations that a model of this size memorises and varies them.
    lines = [json.dumps({"instruction": task.instruction, "output": task.response}) for task in conversations(12)]
    (folder / "reference.jsonl").write_text("\n".join(lines))
    experiment["reference"] = {"path": str(folder / "reference.jsonl")}
    experiment["seed_pool"] = {"path": "builtin", "limit": 40}  # LLM2LLM measures all of them, twice
    experiment["synthesis"]["instruction"]["max_tokens"] = 20
    experiment["synthesis"]["response"]["max_tokens"] = 12
    experiment["nomad"] = {"learning_rate": 6e-3, "epochs": 40, "teacher_examples": 10}
    experiment["nomad"] |= {"batch_size": 4, "micro_batch_size": 4}
    experiment["nomad"]["sampling"] = {"top_p": 1.0, "presence_penalty": 0.0, "max_tokens": 32}
    content = {
        "name": "tiny-study",
        "experiment": experiment,
        "methods": [*REGISTRY, "own:MINE"],
        "seeds": [3],
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(content))


def environment_of(folder: Path) -> dict[str, str]:
    return {
        "PREFECT_HOME": str(folder / "prefect"),
        "PYTHONPATH": f"{ROOT}:{folder}",
        "MONTESSORI_CACHE": str(folder / "cache"),
    }
