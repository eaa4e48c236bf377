"""What cards publish of models and settings: ids of the hub, and of local paths only the last part."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic.fields import FieldInfo

from montessori_core.config import DataSource, Experiment, parse_experiment, read_experiment
from montessori_core.data.origins import Origin, write_origins
from montessori_core.export.card import data_card, run_card
from montessori_core.export.card_scores import Evaluated, card_with_scores
from montessori_core.export.formats import FORMATS
from montessori_core.export.model_card import student_card
from montessori_core.export.models import ROLES, model_card
from montessori_core.export.published import FREE_FORM, PATHS, PRIVATE, name_of, published_changes, published_settings
from montessori_core.export.sets import open_set
from montessori_core.files import read_json, write_json
from montessori_core.tracking.numbers import numbers_of
from montessori_report.run_page import render_published_report
from support.reports import write_run
from tasks.students import sft_settings

COMMIT = "1" * 40


def header_of(card: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return content


@pytest.mark.parametrize(
    ("model", "commits", "base"),
    [
        ("group/tiny", {"group/tiny@main": COMMIT}, "group/tiny"),
        ("gpt2", {"gpt2@main": COMMIT}, "gpt2"),
        ("smollm2-135m", {}, None),
        ("/cluster/home/somebody/secret-llama", {}, None),
        ("~/m/secret-llama", {}, None),
        ("models/secret-llama", {}, None),
        (
            f"/cache/models--group--tiny/snapshots/{COMMIT}",
            {f"/cache/models--group--tiny/snapshots/{COMMIT}@main": COMMIT},
            None,
        ),
    ],
)
def test_model_card_names_base_of_hub_only(
    model: str, commits: dict[str, str], base: str | None, tmp_path: Path
) -> None:
    """Also on another machine than the run's, where the folder does not exist."""
    run = write_run(tmp_path / "trial", student={"model": model})
    write_json(commits, run / "models.json")
    assert header_of(model_card(run, "student", 1, adapter=False)).get("base_model") == base


def test_published_settings_shorten_every_path(tmp_path: Path) -> None:
    models = {
        "teacher": {"model": "group/tiny", "chat_template": "acme/template.jinja"},
        "student": {"model": "models/secret-llama"},
        "answerer": {"model": "meta-llama/Llama", "parameters": {"adapter": "acme/adapters/last"}},
        "judge": {"model": "/acme/judge"},
    }
    sets = {
        "seed_pool": {"path": "data/acme/clients.jsonl"},
        "evaluation": {"path": "group/rows", "revision": "refs/pr/1"},
    }
    texts = {
        "completion_prompt": "{demonstrations} A task at https://example.com/x and/or another:",
        "separator": "</a>",
        "answers": "endpoint",
        "language": "Bosnian/Croatian",
    }
    own = {"name": "rules:Own", "settings": {"list": "acme/words.txt", "lists": ["~/acme/a b"], "in": {"x": "/acme/b"}}}
    filters = [{"name": "words", "words": ["and/or", "~/x", "./he/she"]}, own]
    tasks = [{"name": name} for name in ("mmlu", "/acme/x/1.yaml", "~/acme/2.yaml", "./acme/3.yaml", "acme/4.yaml")]
    benchmarks = {
        "mt_bench": "acme secret/questions.jsonl",
        "alpaca_eval": "s3://acme-bucket/tasks.json",
        "tasks": tasks,
    }
    run = write_run(tmp_path / "trial", benchmarks=benchmarks, synthesis=texts | {"filters": filters}, **models, **sets)
    write_json({"group/tiny@main": COMMIT}, run / "models.json")
    write_origins({"evaluation": Origin(None, COMMIT), "seed_pool": Origin(None)}, run / "data_sets.json")
    experiment = read_experiment(run / "config.yaml")
    for settings in (published_settings(run, experiment), published_changes(run, experiment)):
        assert not [name for name in ("acme", "secret/", "models/") if name in str(settings)]
        shown = {name: settings[name].get("path") or settings[name]["model"] for name in (*models, *sets)}
        assert shown == {
            "teacher": "group/tiny",
            "student": "PATH/secret-llama",
            "seed_pool": "PATH/clients.jsonl",
            "evaluation": "group/rows",
            "answerer": "meta-llama/Llama",
            "judge": "PATH/judge",
        }
        assert settings["synthesis"].items() >= texts.items()
        assert settings["synthesis"]["filters"][0] == filters[0]
        assert settings["synthesis"]["filters"][1]["settings"] == {
            "list": "PATH/words.txt",
            "lists": ["PATH/a b"],
            "in": {"x": "PATH/b"},
        }
        assert settings["evaluation"]["revision"] == "refs/pr/1"
        names = [task["name"] for task in settings["benchmarks"]["tasks"]]
        assert names == ["mmlu", *(f"PATH/{number}.yaml" for number in range(1, 5))]
    built_in = experiment.model_copy(update={"reference": DataSource(path="builtin/maths")})
    assert published_settings(run, built_in)["reference"]["path"] == "builtin/maths"


def fields_of(kind: Any, name: str = "", field: FieldInfo | None = None) -> Iterator[tuple[str, FieldInfo, Any]]:
    """Yield (name, field, type) of all fields of a section and of the sections in it."""
    if get_origin(kind) is dict or (field is not None and not get_args(kind) and not hasattr(kind, "model_fields")):
        assert field is not None
        yield name, field, kind
    for part in get_args(kind):
        yield from fields_of(part, name, field)
    for part, inner in getattr(kind, "model_fields", {}).items():
        yield from fields_of(inner.annotation, part, inner)


def test_every_path_and_free_form_setting_is_known() -> None:
    """Their values are shortened before they are published; those of other settings are published as they are."""
    no_path = {"revision", "subset", "split"}  # described by what they mean for a folder
    known = 0
    for section, info in Experiment.model_fields.items():
        for name, field, kind in [] if section in PRIVATE else fields_of(info.annotation, section, info):
            is_path = kind is Path or (kind is str and re.search("file|folder|document", field.description or "", re.I))
            known += bool(is_path)
            assert get_origin(kind) is not dict or name in FREE_FORM
            assert not is_path or name in PATHS | no_path | PRIVATE, name
    assert known > 10


@pytest.mark.parametrize(
    ("name", "public", "shown"),
    [
        ("group/rows", ["group/rows"], "group/rows"),
        ("models/x", ["group/rows"], "x"),
        ("acme/clients.jsonl", [], "clients.jsonl"),
        ("checkpoints/secret/model", [], "model"),
        ("~/model", [], "model"),
        ("gpt2", [], "gpt2"),
        ("builtin/maths", [], "builtin/maths"),
        ("https://acme/rows.jsonl?X-Amz-Signature=secret", [], "rows.jsonl"),
    ],
)
def test_published_name_hides_the_path(name: str, public: list[str], shown: str) -> None:
    assert name_of(name, public) == shown


def test_cards_show_folder_by_name_only(tmp_path: Path) -> None:
    sections = {
        "teacher": {"model": "group/tiny"},
        "student": {"model": "acme/llama"},
        "seed_pool": {"path": "https://acme/rows.jsonl?sig=acme"},
        "evaluation": {"path": "acme/rows"},
        "answerer": {"model": "/acme/served"},
        "judge": {"model": "vendor/large"},
        "synthesis": {"answers": "endpoint"},
    }
    run = write_run(tmp_path / "trial", **sections)
    write_json({"group/tiny@main": COMMIT}, run / "models.json")
    metrics = read_json(run / "iteration-1" / "metrics.json")
    for row in (*metrics["scores"][:3], *metrics["contamination"]):
        row["benchmark"] = "/acme/x/task.yaml"
    write_json(metrics, run / "iteration-1" / "metrics.json")
    data = open_set(run, "training")
    cards = [model_card(run, role, 1, adapter=False) for role in ROLES]
    cards += [data_card(data, FORMATS["trl"], "train.jsonl", 1, 0, 0), run_card([(data, 1)], {}, FORMATS["parquet"])]
    experiment = read_experiment(run / "config.yaml")
    settings = sft_settings(experiment, experiment.training, save_moments=False)
    cards.append(student_card(experiment, DataSource(path="acme/rows"), Origin(None), settings, {}, []))
    scored = Evaluated("trial", "rows.jsonl", "2026-11-28", 96, {"mean": 1.5, "standard_error": 0.1}, metrics["scores"])
    cards.append(card_with_scores(cards.pop(), "student", scored) or "")
    page = render_published_report(run, experiment)
    assert not [text for text in (page.html, *page.data.values(), *numbers_of(metrics)) if "acme" in text]
    assert sum("task.yaml, acc" in card.replace("\\", "") for card in cards) == len(ROLES) + 1
    for card in cards:
        assert "acme" not in card
        assert "llama" in card
        assert "group/tiny" in card or card == cards[-1]
    assert all("vendor/large (API)" in card and "| answerer | served (API)" in card for card in cards[2:4])


@pytest.mark.parametrize(
    ("teacher", "answers", "student", "declared"),
    [
        ("apache-2.0", "updated", "apache-2.0", True),
        ("llama3", "updated", "apache-2.0", False),
        (None, "updated", "apache-2.0", False),
        ("apache-2.0", "endpoint", "apache-2.0", False),
    ],
)
def test_student_declares_licence_that_its_teachers_share(
    teacher: str | None, answers: str, student: str, declared: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "teacher-model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).touch()
    (folder / "README.md").write_text(f"---\nlicense: {teacher}\n---\n" if teacher else "")
    answerer = {"answerer": {"model": "acme/large"}} if answers == "endpoint" else {}
    sections = {"teacher": {"model": str(folder)}, "synthesis": {"answers": answers}} | answerer
    run = write_run(tmp_path / "trial", **sections)
    card = model_card(run, "student", 1, adapter=False)
    assert header_of(card).get("license") == (student if declared else None)
    assert f"| student | smollm2-135m | {student} |" in card
    assert f"| teacher | teacher-model | {teacher or 'not known'} |" in card
    assert ("| answerer | acme/large (API) | not known |" in card) == (answers == "endpoint")
    assert ("set `license` in the header before you publish" in card) != declared
    assert header_of(model_card(run, "teacher", 1, adapter=False)).get("license") == teacher


@pytest.mark.parametrize("licence", ["apache-2.0", "cc-by-4.0", None])
def test_trained_student_declares_licence_of_its_data(licence: str | None) -> None:
    experiment = parse_experiment({"teacher": {"model": "smollm2-135m"}, "student": {"model": "smollm2-135m"}}, "test")
    settings = sft_settings(experiment, experiment.training, save_moments=False)
    card = student_card(experiment, DataSource(path="rows.jsonl"), Origin(licence), settings, {}, [])
    assert header_of(card).get("license") == (licence if licence == "apache-2.0" else None)
    assert f"| licence of the data | {licence or 'not stated'} |" in card
