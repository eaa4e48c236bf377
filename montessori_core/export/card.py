"""The data card of an export: README.md, with the YAML header of the Hugging Face hub.

Everything comes from the folder of the run. Names and texts are escaped, and paths of this machine are shortened to their
last part: cards are published.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from montessori_core import layout
from montessori_core.config import DataSource, GroundedStrategy, dump_yaml
from montessori_core.data.contamination import TRAINING_SET
from montessori_core.data.jsonl import jsonl_rows
from montessori_core.data.origins import Origin, read_origins
from montessori_core.data.tables import INSTRUCTIONS, read_table
from montessori_core.export.formats import Format
from montessori_core.export.markdown import escape, fenced, table
from montessori_core.export.published import published_changes
from montessori_core.export.sets import RunSet
from montessori_core.files import read_json
from montessori_core.formatting import task_name
from montessori_core.models.licences import licence_of
from montessori_core.synthesis.filtering import funnel

_SIZES = {1e3: "n<1K", 1e4: "1K<n<10K", 1e5: "10K<n<100K", 1e6: "100K<n<1M", 1e7: "1M<n<10M", 1e8: "10M<n<100M"}
_TYPES = {pa.string(): "string", pa.float64(): "float64", pa.int32(): "int32", pa.bool_(): "bool"}
_TASKS = {"training": "supervised fine-tuning", "scored": "data selection", "preferences": "preference optimization"}
_TAGS = {"training": "instruction-tuning", "scored": "data-selection", "preferences": "dpo"}
_AXOLOTL = {
    "messages": "type: chat_template\n    field_messages: messages",
    "sharegpt": "type: chat_template\n    field_messages: conversations\n    message_property_mappings: "
    "{role: from, content: value}",
    "alpaca": "type: alpaca",
}
_LLAMA_FACTORY = {
    "messages": '{"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": {"role_tag": "role", '
    '"content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}}',
    "sharegpt": '{"formatting": "sharegpt", "columns": {"messages": "conversations"}}',
    "alpaca": '{"columns": {"prompt": "instruction", "query": "input", "response": "output"}}',
}


def data_card(data: RunSet, form: Format, file: str, rows: int, unfinished: int, left_out: int) -> str:
    """Return the card of an export.

    Args:
        data: the exported set.
        form: its format.
        file: the data file, relative to the card.
        rows: number of rows.
        unfinished: number of rows whose response was cut at the token limit.
        left_out: number of such rows that were left out.
    """
    finished_only = " --finished-only" if left_out else ""
    sections = {
        "Columns": table(("column", "content"), [(f.name, _description(f)) for f in form.schema(data.schema)]),
        "Read it": _loading(form, file),
        **_origin(data),
        "Repeat it": _repetition(
            data,
            f"montessori run config.yaml\nmontessori export runs/{data.experiment.name} --what {data.name} "
            f"--to {form.name} --iteration {data.iteration}{finished_only}",
        ),
    }
    header = {
        **_header(f"{data.experiment.name}: {data.title}", [_TAGS[data.name]], rows),
        "configs": [_files("default", file)],
        "dataset_info": _features(data, form),
    }
    return _card(header, _summary(data, form, rows, unfinished, left_out), sections)


def run_card(sets: Sequence[tuple[RunSet, int]], models: Mapping[str, int], form: Format) -> str:
    """Return the card of a pushed run: of its sets, each in the files `set_file` names, and of its models.

    Args:
        sets: the sets with their numbers of rows, in the order of iterations; the last training set is described.
        models: iteration of each model, by role.
        form: format of the sets.
    """
    features = {data.name: _features(data, form) for data, _ in sets}
    last, size = [(data, rows) for data, rows in sets if data.name == "training"][-1]
    experiment = last.experiment
    teacher, student = (escape(last.name_of(model.model)) for model in (experiment.teacher, experiment.student))
    content = [(set_file(data), f"{data.title} of iteration {data.iteration}", f"{rows:,} rows") for data, rows in sets]
    content += [(model_path(role), f"{role} of iteration {number}", "") for role, number in models.items()]
    sections = {
        "Content": table(("path", "content", ""), content),
        "Read it": fenced(
            "\n".join(
                ["from datasets import load_dataset", ""]
                + [f'{name} = load_dataset("FOLDER", "{name}", split="train")' for name in features]
            ),
            "python",
        ),
        **_origin(last),
        "Repeat it": _repetition(last, "montessori run config.yaml"),
    }
    header = {
        **_header(experiment.name, [_TAGS[name] for name in features], size),
        "configs": [_files(name, f"data/{name}/*.parquet") for name in features],
        "dataset_info": [{"config_name": name} | columns for name, columns in features.items()],
    }
    summary = (
        f"# {escape(experiment.name)}\n\n"
        f"Training data that {teacher} wrote for {student} in {last.iteration} of {experiment.iterations} iterations, what "
        "was measured on it, and the trained models. Texts were written by models and were not checked by people; they may "
        "be wrong or harmful.\n"
    )
    return _card(header, summary, sections)


def set_file(data: RunSet) -> str:
    """Return the file of a set in a pushed run, relative to its card."""
    return f"data/{data.name}/{layout.iteration(data.iteration)}.parquet"


def model_path(role: str) -> str:
    """Return the folder of a model in a pushed run, relative to the run's card."""
    return f"models/{role}"


def _origin(data: RunSet) -> dict[str, str]:
    """Return the sections on where a set comes from, by their titles."""
    return {
        "Models": _models(data),
        "How it was made": _synthesis(data),
        "Contamination": _contamination(data),
        "Held-out loss": _losses(data),
    }


def _card(header: Mapping[str, Any], summary: str, sections: Mapping[str, str]) -> str:
    parts = [f"---\n{dump_yaml(dict(header))}---\n", summary]
    return "\n".join(parts + [f"## {title}\n\n{text}" for title, text in sections.items() if text])


def _header(name: str, tags: Sequence[str], rows: int) -> dict[str, Any]:
    return {
        "pretty_name": name,
        "task_categories": ["text-generation"],
        "tags": ["synthetic", "montessori", *tags],
        "size_categories": [next((size for limit, size in _SIZES.items() if rows < limit), "n>1T")],
    }


def _files(name: str, path: str) -> dict[str, Any]:
    return {"config_name": name, "data_files": [{"split": "train", "path": path}]}


def _features(data: RunSet, form: Format) -> dict[str, Any]:
    return {"features": [_feature(field) for field in form.schema(data.schema)]}


def _feature(field: pa.Field) -> dict[str, Any]:
    """Return a column in the notation of `dataset_info` on the hub."""
    if pa.types.is_list(field.type):
        return {"name": field.name, "list": [_feature(part) for part in field.type.value_type]}
    return {"name": field.name, "dtype": _TYPES[field.type]}


def _description(field: pa.Field) -> str:
    return str((field.metadata or {}).get(b"description", b"").decode())


def _summary(data: RunSet, form: Format, rows: int, unfinished: int, left_out: int) -> str:
    experiment = data.experiment
    text = (
        f"# {escape(experiment.name)}: {data.title}\n\n"
        f"{rows:,} rows for {_TASKS[data.name]}, in the format {form.name}. "
        f"The instructions were written by {escape(data.teacher)}, in iteration {data.iteration} of "
        f"{experiment.iterations}, for the student {escape(data.name_of(experiment.student.model))}. "
        "Texts were written by models and were not checked by people; they may be wrong or harmful.\n"
    )
    if data.name == "preferences":
        return text + (
            "\nPrompts have the teacher's chat template already: do not apply one again. The run trained on the tokens that "
            "the teacher drew; tokenizing these texts again may cut some words differently.\n"
        )
    if unfinished:
        text += (
            f"\n{unfinished:,} responses were cut at the token limit: their `response_finished` is false. A trainer that "
            "ends every response with an end token teaches the student to stop there; leave these rows out, or mask the end "
            "token as Montessori does.\n"
        )
    if left_out:
        text += (
            f"\n{left_out:,} more rows of the {data.title} were left out (`--finished-only`): their responses were cut "
            "at the token limit. Numbers of the run below count them.\n"
        )
    return text


def _loading(form: Format, file: str) -> str:
    text = fenced('from datasets import load_dataset\n\ndata = load_dataset("FOLDER", split="train")', "python")
    if form.name == "trl":
        text += "\nTRL's trainers take this data set as it is.\n"
    if form.name in _AXOLOTL:
        entry = f"datasets:\n  - path: FOLDER/{file}\n    ds_type: json\n    {_AXOLOTL[form.name]}"
        text += f"\naxolotl:\n\n{fenced(entry, 'yaml')}"
        entry = f'"NAME": {{"file_name": "FOLDER/{file}", {_LLAMA_FACTORY[form.name][1:]}'
        text += f"\nLLaMA-Factory, in `dataset_info.json`:\n\n{fenced(entry, 'json')}"
    return text


def _models(data: RunSet) -> str:
    experiment = data.experiment
    commits = read_json(data.run / layout.MODEL_COMMITS) or {}
    hashes = read_json(data.run / layout.PROVENANCE) or {}
    rows = []
    for role, section in (("teacher", experiment.teacher), ("student", experiment.student)):
        commit = commits.get(f"{section.model}@{section.revision or 'main'}", "")
        licence = licence_of(section.model, commit or section.revision) or "not known"
        rows.append((role, data.name_of(section.model), commit, licence, hashes.get(f"{role}_sha256", "")))
    for role in ("strong_teacher", "answerer", "judge"):
        if (endpoint := getattr(experiment, role)) is not None:
            rows.append((role.replace("_", " "), f"{data.name_of(endpoint.model)} (API)", "", "not known", ""))
    return (
        table(("role", "model", "commit", "licence", "SHA-256"), rows)
        + "\nNo licence of the data is declared here. Those of these models and of the human-written sets may bind what was "
        "written; set `license` in the header before you publish.\n"
    )


def _synthesis(data: RunSet) -> str:
    experiment = data.experiment
    origins = read_origins(data.run / layout.ORIGINS)
    sources = {name: getattr(experiment, name) for name in _SOURCES}
    sets = [_source(data, name, source, origins.get(name, Origin(None))) for name, source in sources.items()]
    if isinstance(strategy := experiment.synthesis.strategy, GroundedStrategy):
        licence = origins.get("documents", Origin(None)).licence_text
        sets.append(("documents", data.name_of(strategy.documents), "", "", licence, ""))
    names = [getattr(entry, "name", entry) for entry in experiment.synthesis.filters]
    lines = [
        table(("set", "source", "revision", "commit", "licence", "examples"), sets),
        f"Random seed: {experiment.seed}. Strategy of prompts: {escape(experiment.synthesis.strategy.name)}.",
        f"Filters, in order: {', '.join(map(escape, names)) or 'none'}. "
        f"`synthesis.answers`: {escape(experiment.synthesis.answers)}.\n",
    ]
    if data.name != "training":
        lines.append(
            f"Influence: estimator {escape(experiment.influence.estimator)}, on the reference set, by one AdamW step of the "
            f"warm student; baseline {escape(experiment.preferences.baseline)}.\n"
        )
    tables = data.folder / ("training" if data.name == "training" else "") / layout.INSTRUCTIONS
    if tables.exists():
        counts = funnel(read_table(tables, INSTRUCTIONS, ["rejection"]))
        lines.append(f"The funnel of instructions:\n\n{table(('step', 'instructions'), list(counts.items()))}")
    return "\n".join(lines)


_SOURCES = ("seed_pool", "reference", "evaluation")


def _source(data: RunSet, name: str, source: DataSource, origin: Origin) -> tuple[str, str, str, str, str, str]:
    """Return the row of a human-written set: set, source, revision, commit, licence and size."""
    parts = [data.name_of(source.path), *filter(None, [source.subset])]
    copy = data.run / layout.SOURCES / f"{name}.jsonl"
    size = f"{sum(1 for _ in jsonl_rows(copy)):,}" if copy.exists() else ""
    title, commit = name.replace("_", " "), origin.commit or ""
    return title, ", ".join(parts), source.revision or "", commit, origin.licence_text, size


def _contamination(data: RunSet) -> str:
    counts = (read_json(data.folder / layout.METRICS) or {}).get("contamination") or []
    rows = [
        (task_name(count["benchmark"]), f"{count['overlapping']} of {count['items']}", count["n"])
        for count in counts
        if count["data"] == TRAINING_SET
    ]
    if not rows:
        return "Not checked: the run has no numbers for it (`benchmarks.contamination_words`, or an unfinished iteration).\n"
    note = "" if data.name == "training" else "\nThe check was of the iteration's training set, not of these rows.\n"
    return (
        "Items of evaluation sets that share n consecutive words with the training set:\n\n"
        + table(("evaluation set", "overlapping items", "n"), rows)
        + note
    )


def _losses(data: RunSet) -> str:
    losses: Mapping[str, Any] = (read_json(data.folder / layout.METRICS) or {}).get("held_out_loss") or {}
    rows = [(name, f"{loss['mean']:.4f}", f"{loss['standard_error']:.4f}") for name, loss in losses.items()]
    if not rows:
        return ""
    return "Of students on the evaluation set, nats per token:\n\n" + table(("student", "mean", "standard error"), rows)


def _repetition(data: RunSet, command: str) -> str:
    provenance = read_json(data.run / layout.PROVENANCE) or {}
    revision = provenance.get("git_revision") or "not known"
    versions = ", ".join(f"{name} {number}" for name, number in (provenance.get("versions") or {}).items())
    return "\n".join(
        [
            fenced(command, "bash"),
            "with `config.yaml` (settings that differ from the defaults; PATH stands for a folder of the author's "
            f"machine):\n\n{fenced(dump_yaml(published_changes(data.run, data.experiment)), 'yaml')}",
            f"Versions: {escape(versions)}. Revision of Montessori: {escape(revision)}.\n",
        ]
    )
