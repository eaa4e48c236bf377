"""The report: self-contained, safe for any model text, and correct for unfinished runs."""

import base64
import csv
import hashlib
import io
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from montessori_core import formatting
from montessori_core.data.tables import INFLUENCE, INSTRUCTIONS, PREFERENCES, read_table, table_from_rows, write_table
from montessori_core.errors import DataError
from montessori_core.evaluation.scores import judged_benchmark
from montessori_core.files import write_json
from montessori_core.formatting import benchmark_name
from montessori_core.influence.preferences import threshold_of
from montessori_core.synthesis.filtering import NO_TAGS, rejection_by
from montessori_core.synthesis.filters.length import LENGTH, TOO_SHORT
from montessori_report.compare_page import render_runs
from montessori_report.run_data import InfluenceData, read_run_data
from montessori_report.run_page import render_report
from montessori_report.sections.examples import EXAMPLES_SHOWN, PAIRS_SHOWN, REJECTIONS_SHOWN
from montessori_report.sections.influence import histogram_edges, positive_shares, share_of
from montessori_report.study_page import study_page
from support.reports import (
    HOSTILE,
    REPEATED,
    SHOWN,
    Page,
    metrics,
    page_of,
    score,
    stage_use,
    write_run,
    write_study,
    write_synthesis,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "trial")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(write_run(tmp_path_factory.mktemp("runs") / "hostile", texts=HOSTILE))


def test_report_shows_share_of_target_kind(tmp_path: Path) -> None:
    """Before the update a fourth of the texts are sums, after it half of them are."""
    song, total = "Write a song about the rain.", "A pen costs 3 euros. How many euros do 12 pens cost in total?"
    folder = write_run(tmp_path / "run", texts=[total, song, song, song], reference={"path": "builtin/maths"})
    write_synthesis(folder / "iteration-1" / "training", "i1-training", 40, [total, song])
    rendered = render_report(folder)
    before, after = csv.DictReader(io.StringIO(rendered.data["target-kind-instructions-of-the-target-kind"]))
    column = "share of the instructions of the target kind"
    assert (float(before[column]), float(after[column])) == (0.25, 0.5)
    assert float(after["95 % interval from"]) == pytest.approx(0.352, abs=1e-3)
    page = Page(rendered.html)
    assert "25% → 50%" in page.text
    assert page.count("span", **{"class": "mark"}) == 3 + 5  # of the first ten of each teacher
    assert page.count("div", **{"class": "side before"}) == page.count("div", **{"class": "side after"}) == 1
    assert "balanced accuracy 0.85" in page.text


def test_report_of_many_kinds_says_why_no_share(run: Path) -> None:
    page = page_of(run)
    assert "The share of instructions of the target kind is not shown: a classifier of words cannot tell" in page.text
    assert "Of the target kind" not in page.text
    assert page.count("span", **{"class": "mark"}) == 0
    assert "Unmodified teacher" in page.text
    assert "Teacher after update 1" in page.text


@pytest.mark.parametrize("text", SHOWN.values(), ids=SHOWN.keys())
def test_model_text_is_shown_unchanged(hostile: Page, text: str) -> None:
    assert hostile.text.count(text) > 10


@pytest.mark.guarantee("script in the report")
def test_model_text_never_becomes_markup(hostile: Page, run: Path) -> None:
    harmless = page_of(run)
    assert {tag for tag, _ in hostile.tags} <= {tag for tag, _ in harmless.tags}
    assert {name for _, attributes in hostile.tags for name in attributes} <= {
        name for _, attributes in harmless.tags for name in attributes
    }
    assert hostile.programs == harmless.programs
    data = json.dumps([hostile.plots, hostile.examples], ensure_ascii=False)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", hostile.text + data)


def test_bidirectional_text_is_isolated(hostile: Page) -> None:
    assert hostile.reversing == {"div"}


def test_model_text_never_enters_a_figure(hostile: Page) -> None:
    figures = json.dumps(hostile.plots)
    assert "alert" not in figures
    assert "7*7" not in figures


def test_configuration_and_provenance_are_escaped(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "config.yaml").write_text(f"name: '{HOSTILE[1]}'\nteacher: {{model: '{HOSTILE[0]}'}}\n", encoding="utf-8")
    write_json({"versions": {HOSTILE[0]: HOSTILE[1]}}, folder / "provenance.json")
    page = page_of(folder)
    assert page.count("img") == 0
    assert len(page.programs) == 2


def test_metric_names_are_escaped(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    content = metrics(1)
    name = HOSTILE[1]
    content["scores"] = [score(name, name, name, 0.5)]
    content["head_to_head"] = [{**content["head_to_head"][0], "model": name, "against": name}]
    content["contamination"][0] |= {"benchmark": name, "data": name}
    content["stages"] = [stage_use(name, rows=3, seconds=2.0)]
    content["job_seconds"] = {name: 2.0}
    write_json(content, folder / "iteration-1" / "metrics.json")
    report = render_report(folder)
    page = Page(report.html)
    assert page.count("img") == 0
    assert "<img" not in json.dumps(page.plots)
    assert page.text.count(name.rpartition("/")[2]) >= 5  # of a benchmark, the last part
    assert all(re.fullmatch(r"[a-z0-9-]+", slug) for slug in report.data)


def test_cost_leaves_out_stages_of_earlier_settings(tmp_path: Path) -> None:
    """Of options that are off now, and of an iteration beyond the configured number; the sum of all is shown."""
    folder = write_run(tmp_path / "run")
    content = metrics(1)
    content["stages"] = [stage_use("iteration-1/student", rows=4, seconds=100.0, flops=1)]
    content["job_seconds"] = {"iteration-1/student": 100.0}
    content["unused_stages"] = [stage_use("unmodified/student", rows=4, seconds=50.0, flops=2)]
    write_json(content, folder / "iteration-1" / "metrics.json")
    later = {"stages": [stage_use("iteration-2/student", rows=4, seconds=25.0, flops=4), *content["unused_stages"]]}
    (folder / "iteration-2").mkdir()
    write_json(metrics(2) | later, folder / "iteration-2" / "metrics.json")
    run = read_run_data(folder)
    assert [stage["stage"] for stage in run.stages] == list(run.job_seconds) == ["iteration-1/student"]
    assert [stage["stage"] for stage in run.unused_stages] == ["iteration-2/student", "unmodified/student"]
    report = render_report(folder)
    seconds = report.data["cost-seconds-of-jobs-by-stage"]
    assert "100" in seconds
    assert "iteration-2" not in seconds
    text = page_of(folder).text
    assert re.search(
        r"all stages[^a-z]*2 min.*of earlier settings[^a-z]*75 s.*spent in all[^a-z]*3 min", text, re.DOTALL
    )
    compared = render_runs([folder, shutil.copytree(folder, tmp_path / "other")]).data["cost-seconds-of-jobs"]
    assert [float(row["seconds"]) for row in csv.DictReader(io.StringIO(compared))] == [100.0, 100.0]


def test_interruptions_of_earlier_versions_are_shown(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    content = metrics(1)
    stage = stage_use("influence", rows=3, seconds=2.0)
    del stage["interruptions"]
    content["stages"] = [stage | {"preemptions": 41}]
    write_json(content, folder / "iteration-1" / "metrics.json")
    text = page_of(folder).text
    assert "Interruptions" in text
    assert "41" in text


def test_costs_explain_paper_numbers(run: Path, tmp_path: Path) -> None:
    report, study = page_of(run), Page(study_page(*write_study(tmp_path / "study"), tmp_path / "study").html)
    for page in (report, study):
        assert "Appendix E.3 counts a pass over 128 tokens for every token" in page.text
        assert "(Appendix E.3)" not in page.text
        assert "rule of Appendix E.3" not in page.text
    assert "wall time on 8 H100s, that is 107 and 28 GPU-seconds" in report.text


def test_judged_scores_name_judge_prompts(run: Path, tmp_path: Path) -> None:
    page = page_of(run)
    assert "MT-Bench (own judge prompts): score writing" in page.text
    assert "arc_challenge: acc norm" in page.text
    assert "compares the answers of two models with own judge prompts" in page.text
    study = Page(study_page(*write_study(tmp_path / "study"), tmp_path / "study").html)
    assert "MT-Bench (own judge prompts): score" in study.text

    folder = shutil.copytree(run, tmp_path / "run")
    content = metrics(1)
    content["scores"] = [score("student", judged_benchmark("mt_bench", "published"), "score_writing", 6.0)]
    content["head_to_head"][0]["judge_prompts"] = "published"
    write_json(content, folder / "iteration-1" / "metrics.json")
    page = page_of(folder)
    assert "MT-Bench (published judge prompts): score writing" in page.text
    assert "compares the answers of two models with own and published judge prompts" in page.text
    assert benchmark_name("alpaca_eval_published against x") == "AlpacaEval (published judge prompts) against x"


@pytest.mark.guarantee("script in the report")
def test_page_allows_only_its_scripts(hostile: Page) -> None:
    (policy,) = (a["content"] for tag, a in hostile.tags if tag == "meta" and "http-equiv" in a)
    directives = dict(part.strip().split(" ", 1) for part in str(policy).split(";"))
    digests = [base64.b64encode(hashlib.sha256(program.encode()).digest()).decode() for program in hostile.programs]
    assert directives["script-src"] == " ".join(f"'sha256-{digest}'" for digest in digests)
    assert directives["default-src"] == "'none'"
    assert not any(name.startswith("on") for _, attributes in hostile.tags for name in attributes)


def test_report_needs_no_network(run: Path) -> None:
    page = page_of(run)
    targets = [a[name] for _, a in page.tags for name in ("src", "href", "action", "data", "srcset") if name in a]
    assert targets
    assert all(str(target).startswith("#") for target in targets)
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert "url(" not in page.style
    assert "@import" not in page.style


def test_contents_links_resolve(run: Path) -> None:
    page = page_of(run)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {str(a["href"])[1:] for tag, a in page.tags if tag == "a"} <= set(ids)


def test_figures_are_valid_and_captioned(run: Path) -> None:
    page = page_of(run)
    assert len(page.plots) == page.count("figure") == page.count("figcaption") > 10
    for plot in page.plots:
        figure = go.Figure(plot)  # raises on unknown properties
        assert figure.data


def test_figure_data_is_in_page_and_files(tmp_path: Path) -> None:
    report = render_report(write_run(tmp_path / "run", iterations=2))
    report.write(tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    embedded = [content["csv"] for content in page.data("figure")]
    names = [a["data-name"] for tag, a in page.tags if tag == "button" and "data-name" in a]
    written = {path.name: path.read_text() for path in (tmp_path / "report-data").iterdir()}
    assert written == dict(zip(names, embedded, strict=True))
    assert len(written) == len(embedded)
    for text in embedded:
        header, *rows = csv.reader(io.StringIO(text))
        assert rows
        assert {len(row) for row in rows} == {len(header)}


def test_exported_data_equals_tables(run: Path) -> None:
    data = {name: list(csv.DictReader(io.StringIO(text))) for name, text in render_report(run).data.items()}
    funnel = {row["step"]: int(row["instructions"]) for row in data["synthesis-iteration-1-probing-set"]}
    assert funnel == {"candidates": 46, REPEATED: 3, NO_TAGS: 3, "kept": 40}
    probed = read_table(run / "iteration-1" / "influence.parquet", INFLUENCE).to_pylist()
    audited = {row["example_id"]: row["influence_null_step"] for row in probed if row["audited"]}
    agreement = data["influence-first-order-estimate-against-exact-influence"]
    (column,) = (name for name in agreement[0] if name.startswith("exact"))
    assert {row["example_id"]: float(row[column]) for row in agreement} == pytest.approx(
        {name: 1e6 * value for name, value in audited.items()}
    )
    lengths = [row for row in data["synthesis-lengths-of-instructions-figure-11"] if row["set"] == "Teacher 0"]
    assert sum(int(row["examples"]) for row in lengths) == 40


def test_batches_count_positive_influence_in_training_order(run: Path) -> None:
    table = read_table(run / "iteration-1" / "influence.parquet", INFLUENCE)
    measured = table["influence_student"].to_pylist()[:-1]  # the last was not
    values = [*(value - sorted(measured)[20] for value in measured), None]
    position = table.column_names.index("influence_student")
    table = table.set_column(position, "influence_student", pa.array(values, pa.float64()))
    shares = positive_shares(InfluenceData("set", table, threshold=values[0]), 16)
    assert list(shares) == [1, 2, 3]
    sizes = (16, 16, 7)
    assert sum(share * size for share, size in zip(shares.values(), sizes, strict=True)) == pytest.approx(18)
    assert shares[1] == sum(value > 0 for value in values[:16]) / 16


def test_report_takes_response_length_out_of_influence(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    path = folder / "iteration-1" / "influence.parquet"
    table = read_table(path, INFLUENCE)
    rows = table.to_pylist()
    for row in rows:
        if row["status"] == "ok":  # longer responses help more
            row["influence_student"] += 1e-4 * (row["response_tokens"] - 23)
    write_table(table_from_rows(rows, table.schema), path, INFLUENCE)
    measured = [row for row in rows if row["status"] == "ok"]
    values, tokens = (np.array([row[name] for row in measured]) for name in ("influence_student", "response_tokens"))
    slope, intercept = np.polyfit(tokens, values, 1)
    rest = values - (slope * tokens + intercept) + values.mean()
    threshold = threshold_of(read_table(path, INFLUENCE), "median")
    helpful, with_length = (share_of(int((part > threshold).sum()), len(part)) for part in (rest, values))
    text = Page(render_report(folder).html).text
    assert f"share that helps, adjusted for response length{helpful}" in text
    assert f"share that helps (better than the threshold){with_length}" in text
    explained = 1 - rest.var() / values.var()
    assert 0.2 < explained < 0.9
    assert f"variance of influence that response length explains{formatting.share(explained)}" in text


def test_report_takes_out_longer_responses_of_update(run: Path, tmp_path: Path) -> None:
    """A training set whose influence differs only by its longer responses helps no more often than the probing set."""
    folder = shutil.copytree(run, tmp_path / "run")
    probed = read_table(folder / "iteration-1" / "influence.parquet", INFLUENCE)
    rows = probed.to_pylist()
    measured = [row for row in rows if row["status"] == "ok"]
    for row in measured:
        row["influence_student"] += 1e-4 * row["response_tokens"]
    longer = [dict(row) for row in rows]
    slope, _ = np.polyfit(*([row[name] for row in measured] for name in ("response_tokens", "influence_student")), 1)
    for row in longer:
        if row["status"] == "ok":
            row["response_tokens"] += 80
            row["influence_student"] += 80 * slope
    for name, content in (("influence", rows), ("training-influence", longer)):
        table = table_from_rows(content, probed.schema)
        write_table(table, folder / "iteration-1" / f"{name}.parquet", INFLUENCE)
    text = Page(render_report(folder).html).text
    ((before, after),) = re.findall(r"adjusted for response length(\d+%) \([^)]*\)(\d+%)", text)
    assert after == before
    ((before, after),) = re.findall(r"better than the threshold\)(\d+%) \([^)]*\)(\d+%)", text)
    assert int(after[:-1]) > int(before[:-1]) + 20


def test_report_warns_of_cut_examples_and_dominating_gradients(run: Path, tmp_path: Path) -> None:
    shown = page_of(run).text
    assert "own gradient decides" not in shown
    assert "examples is cut" in shown
    folder = shutil.copytree(run, tmp_path / "run")
    path = folder / "iteration-1" / "influence.parquet"
    table = read_table(path, INFLUENCE)
    index = table.column_names.index("dominated_share")
    shares = pa.array([0.625] * (table.num_rows - 1) + [None])
    write_table(table.set_column(index, INFLUENCE.field(index), shares), path, INFLUENCE)
    text = page_of(folder).text
    assert "Warning, Probing set (teacher before): the example's own gradient decides" in text
    assert "in 62% of the coordinates" in text


@pytest.mark.parametrize(
    ("lost", "sentence"),
    [
        ("iteration-1", "Iteration 1 has not started."),
        ("iteration-1/influence.parquet", "the influence of the probing set"),
        ("iteration-1/training-influence.parquet", "the influence of the training set"),
        ("iteration-1/preferences.parquet", "the preference pairs"),
        ("iteration-1/training", "the synthesis of the training set"),
        ("iteration-1/examples.parquet", "the synthesis of the probing set"),
        ("iteration-1/metrics.json", "the metrics"),
        ("unmodified", "Better student in this run."),
        ("config.yaml", "The configuration (config.yaml) is not in the folder."),
        ("provenance.json", "The provenance (provenance.json) is not in the folder."),
    ],
)
def test_report_renders_unfinished_run(run: Path, tmp_path: Path, lost: str, sentence: str) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    path = folder / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert sentence in page_of(folder).text


def test_report_renders_new_run(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert "No verdict yet" in page.text
    assert page.plots == []


def test_training_logs_show_during_iteration(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "iteration-1" / "metrics.json").unlink()
    (folder / "iteration-1" / "warmup" / "part-00000").mkdir(parents=True)
    write_json([{"step": 1.0, "loss": 1.2345}], folder / "iteration-1" / "warmup" / "part-00000" / "training_log.json")
    assert "1.2345" in page_of(folder).text


def test_damaged_table_is_named(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "iteration-1" / "influence.parquet").write_bytes(b"PAR1 not a table")
    with pytest.raises(DataError, match=r"influence\.parquet"):
        render_report(folder)


def test_two_iterations_are_both_shown(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", iterations=2))
    titles = [trace["y"][0] for plot in page.plots for trace in plot["data"] if trace["type"] == "scatter"]
    for number in (1, 2):
        assert f"i{number}-probing: explain thing number 3" in page.text
        assert any(str(title).startswith(f"Iteration {number}: updated") for title in titles)
    assert {row[3][0][2] for row in page.examples} == {1, 2}  # the column of the iteration
    assert "2 of 2 finished" in page.text


@pytest.mark.parametrize(
    ("gain", "error", "headline"),
    [
        (0.02, 0.004, "Better student in this run."),
        (-0.02, 0.004, "Worse student in this run."),
        (0.0079, 0.004, "Within noise."),
        (-0.0079, 0.004, "Within noise."),
        (0.0, 0.0, "Within noise."),
        (math.nan, 0.004, "No verdict."),
    ],
)
def test_verdict_follows_paired_gain(run: Path, tmp_path: Path, gain: float, error: float, headline: str) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    write_json(metrics(1, gain, error), folder / "iteration-1" / "metrics.json")
    assert headline in page_of(folder).text


@pytest.mark.parametrize(
    ("gain", "headline"),
    [
        (0.02, "Better than unmodified, worse than untrained."),
        (0.0, "Within noise."),
        (-0.02, "Worse student in this run."),
    ],
)
def test_verdict_reports_harmful_training(run: Path, tmp_path: Path, gain: float, headline: str) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    content = metrics(1, gain)
    content["held_out_gain"]["student_over_untrained"]["mean"] = -0.3
    write_json(content, folder / "iteration-1" / "metrics.json")
    text = page_of(folder).text
    assert headline in text
    assert "worse than the untrained student, 2.8000: a paired gain of −0.3000 ± 0.0200" in text


def test_run_without_comparison_claims_none(tmp_path: Path) -> None:
    comparison = {"unmodified_teacher": False, "influence_examples": 0}
    folder = write_run(tmp_path / "run", comparison=comparison)
    content = metrics(1)
    del content["held_out_loss"]["unmodified"], content["held_out_gain"]["student_over_unmodified"]
    write_json(content, folder / "iteration-1" / "metrics.json")
    (folder / "iteration-1" / "training-influence.parquet").unlink()
    text = page_of(folder).text
    assert "No comparison." in text
    assert "comparison.unmodified_teacher is off" in text
    assert "comparison.influence_examples is 0" in text
    assert "is not complete" not in text


def test_non_finite_values_do_not_break_page(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    content = metrics(1)
    content["training_logs"]["student"][2]["loss"] = math.nan
    content["held_out_loss"]["student"]["mean"] = math.inf
    content["job_seconds"]["iteration-1/teacher"] = math.nan
    write_json(content, folder / "iteration-1" / "metrics.json")
    page = page_of(folder)
    assert page.plots
    assert not re.search(r"\b(nan|inf)\b", page.text, re.IGNORECASE)


def test_one_evaluation_example_has_no_standard_error(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    content = metrics(1)
    for statistic in (*content["held_out_loss"].values(), *content["held_out_gain"].values()):
        statistic["standard_error"] = math.nan
    write_json(content, folder / "iteration-1" / "metrics.json")
    page = page_of(folder)
    assert "a single evaluation example gives no standard error" in page.text
    assert "is not finite" not in page.text
    (plot,) = (plot for plot in page.plots if "mean loss" in plot["layout"]["xaxis"]["title"]["text"])
    assert [trace["x"] for trace in plot["data"]] == [[2.8], [2.42], [2.4]]
    assert all(trace["error_x"]["array"] == [0.0] for trace in plot["data"])


@pytest.mark.parametrize("baseline", ["student", "null_step", "median", "prompt"])
def test_figure_shows_threshold_of_each_baseline(tmp_path: Path, baseline: str) -> None:
    folder = write_run(tmp_path / "run", preferences={"baseline": baseline})
    expected = threshold_of(read_table(folder / "iteration-1" / "influence.parquet", INFLUENCE), baseline)
    (plot,) = (plot for plot in page_of(folder).plots if "annotations" in plot["layout"])
    (line,) = (s for s in plot["layout"]["shapes"] if s["type"] == "line" and s["line"]["dash"] == "solid")
    assert line["x0"] == pytest.approx(expected * 1e6)
    for trace in plot["data"]:
        assert sum(trace["y"]) == pytest.approx(1.0)


def test_long_tables_are_truncated_with_note(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", examples=EXAMPLES_SHOWN + 7))
    assert f"The first {EXAMPLES_SHOWN:,} of {EXAMPLES_SHOWN + 7:,} examples" in page.text
    assert len(page.examples) == EXAMPLES_SHOWN
    assert page.count("td", **{"data-label": "Status"}) == 50
    assert page.count("article") == PAIRS_SHOWN
    pairs = read_table(tmp_path / "run" / "iteration-1" / "preferences.parquet", PREFERENCES).num_rows
    assert f"{PAIRS_SHOWN} of {pairs:,} pairs" in page.text


def test_widest_pairs_first_and_all_reasons_shown(run: Path) -> None:
    page = page_of(run)
    gaps = [float(gap.replace(",", "")) for gap in re.findall(r"gap ([\d.,]+) ·", page.text)]
    assert gaps == sorted(gaps, reverse=True)
    assert len(gaps) == PAIRS_SHOWN
    assert re.findall(r"(\d+) rejected, (\d+) shown", page.text) == [("9", "9"), ("9", "9")]


def test_rare_reasons_are_shown(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    path = folder / "iteration-1" / "instructions.parquet"
    rows = read_table(path, INSTRUCTIONS).to_pylist()
    common = [rows[-1] | {"example_id": f"more-{i}", "rejection": rejection_by(LENGTH, TOO_SHORT)} for i in range(200)]
    write_table(table_from_rows(common + rows, INSTRUCTIONS), path, INSTRUCTIONS)
    listed = re.findall(r"(\d+) rejected, (\d+) shown", page_of(folder).text)
    assert listed == [("200", str(REJECTIONS_SHOWN - 18)), ("9", "9"), ("9", "9")]


def test_same_run_gives_same_page(run: Path) -> None:
    assert render_report(run) == render_report(run)


@given(
    st.lists(st.floats(-1.0, 1.0).map(lambda value: round(value, 12)), max_size=40),
    st.integers(-9, 2),
    st.sampled_from([0.0, 0.25, -0.5]),
)
def test_no_histogram_bin_straddles_the_threshold(values: list[float], exponent: int, threshold: float) -> None:
    threshold *= 10.0**exponent
    edges = histogram_edges(np.array(values) * 10.0**exponent, threshold)
    assert len(edges) < 80
    assert (np.diff(edges) > 0).all()
    assert not ((edges[:-1] < threshold) & (edges[1:] > threshold)).any()
