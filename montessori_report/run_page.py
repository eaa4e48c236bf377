"""The report of a run: one self-contained HTML page and a CSV file per figure."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from montessori_core.config import Experiment, dump_yaml
from montessori_core.export.published import published_provenance, published_settings
from montessori_core.formatting import UNKNOWN
from montessori_report.html import Page, Section, Table, build_page
from montessori_report.run_data import RunData, missing_parts, read_run_data
from montessori_report.sections.benchmarks import benchmark_section, held_out_section
from montessori_report.sections.cost import cost_section
from montessori_report.sections.examples import examples_of, pairs_of, rejections_of
from montessori_report.sections.influence import influence_section, influence_unit
from montessori_report.sections.overview import cards_of, facts_of, judge
from montessori_report.sections.synthesis import synthesis_section
from montessori_report.sections.target_kind import target_kind_section, teachers_of
from montessori_report.sections.training_curves import learning_section

_ALL_SETTINGS = "All settings including defaults. To repeat the run, start another with this config.yaml."
_PUBLISHED_SETTINGS = (
    "All settings including defaults, without those that describe the author's site. PATH stands for a folder of the "
    "author's machine."
)


def render_report(folder: Path) -> Page:
    """Return the report of the run in `folder`, finished or not.

    Raises:
        DataError: a table cannot be read.
    """
    return _render(read_run_data(folder), _ALL_SETTINGS)


def render_published_report(folder: Path, experiment: Experiment) -> Page:
    """Return the report of the run in `folder` for publication: without local paths and settings that describe a site.

    Args:
        folder: folder of the run.
        experiment: its configuration.

    Raises:
        DataError: a table cannot be read.
    """
    run = read_run_data(folder)
    settings = published_settings(folder, experiment)
    published = replace(
        run, config=dump_yaml(settings), settings=settings, provenance=published_provenance(run.provenance)
    )
    return _render(published, _PUBLISHED_SETTINGS)


def _render(run: RunData, note: str) -> Page:
    """Return the report of a run; `note` says which of its settings are shown."""
    unit = influence_unit([run])
    sections = [
        Section("overview", "Overview", template="overview.html.j2"),
        target_kind_section(run),
        Section("teachers", "Instructions before and after", template="teachers.html.j2"),
        synthesis_section(run),
        influence_section(run, unit),
        learning_section(run),
        held_out_section(run),
        benchmark_section(run),
        Section("pairs", "Preference pairs", template="pairs.html.j2"),
        Section("examples", "Probing examples", template="examples.html.j2"),
        Section("rejected", "Rejected candidates", template="rejected.html.j2"),
        cost_section(run),
        Section("origin", "Configuration and provenance", template="origin.html.j2"),
    ]
    content = {
        "run": run,
        "unit": unit,
        "verdict": judge(run),
        "missing": missing_parts(run),
        "cards": [(run.heading(iteration), cards_of(iteration, run)) for iteration in run.iterations],
        "pairs": [(run.heading(part), part, pairs_of(part)) for part in run.iterations if part.preferences is not None],
        "across_prompts": run.setting("preferences", "pairs", "within_prompt") == "across_prompts",
        "teachers": teachers_of(run),
        "marks": run.classifier is not None and run.classifier.usable,
        "examples": examples_of(run, unit),
        "rejections": rejections_of(run.syntheses),
        "provenance": _provenance(run),
        "settings_note": note,
    }
    return build_page("Montessori report", run.name, facts_of(run), sections, content)


def _provenance(run: RunData) -> Table | None:
    def flat(content: Any, path: str) -> list[Sequence[str]]:
        if isinstance(content, dict):
            return [row for key in sorted(content) for row in flat(content[key], f"{path}.{key}" if path else key)]
        return [[path, UNKNOWN if content is None else str(content)]]

    return Table("Provenance of the run", ["", "Value"], flat(run.provenance, "")) if run.provenance else None
