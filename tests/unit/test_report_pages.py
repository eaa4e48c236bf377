"""Pages of studies and of several runs: self-contained, safe, with correct numbers."""

import csv
import io
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest

from flows.cli.tables import print_comparison
from flows.methods.llm2llm import LLM2LLM
from flows.methods.self_reward import SELF_REWARD
from montessori_core import formatting
from montessori_core.config import Endpoint, Study
from montessori_core.config.section import parse
from montessori_core.data.tables import INFLUENCE, read_table
from montessori_core.evaluation.scores import score as benchmark_score
from montessori_core.evaluation.statistics import share_interval, share_interval_of_seeds
from montessori_core.files import write_json
from montessori_core.formatting import significant
from montessori_report import html as pages
from montessori_report.compare_page import render_runs
from montessori_report.figures import bar_figure
from montessori_report.study_page import study_page
from support.reports import HOSTILE, METHODS, Page, write_run, write_study
from support.runs import call, invoke


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> pages.Page:
    folder = tmp_path_factory.mktemp("studies") / "trial"
    return study_page(*write_study(folder), folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> pages.Page:
    folder = tmp_path_factory.mktemp("runs")
    first = write_run(folder / "first", iterations=2, texts=HOSTILE)
    second = write_run(folder / "second", preferences={"baseline": "student"}, warmup={"learning_rate": 2e-5})
    return render_runs([first, second])


def rows_of(page: pages.Page, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(page.data[name])))


@pytest.mark.parametrize("kind", ["study", "runs"])
def test_pages_run_only_their_scripts_offline(kind: str, request: pytest.FixtureRequest) -> None:
    rendered = request.getfixturevalue(kind)
    page = Page(rendered.html)
    (policy,) = (a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in str(policy)
    assert len(page.programs) == str(policy).count("sha256-") == 2
    targets = [a[name] for _, a in page.tags for name in ("src", "href", "action", "data", "srcset") if name in a]
    assert all(str(target).startswith("#") for target in targets)
    assert not {"img", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert len(page.plots) == len(rendered.data) == page.count("figure")
    for plot in page.plots:
        assert go.Figure(plot).data


def test_study_page_shows_gains_costs_transfer(tmp_path: Path) -> None:
    study, result = write_study(tmp_path / "study")
    rendered = study_page(study, result, tmp_path / "study")
    against = rows_of(rendered, "cost-gain-against-floating-point-operations-figure-15")
    for row, expected in zip(against, result["methods"], strict=True):
        assert row["method"] == expected["method"]
        assert float(row["floating-point operations of one seed"]) == expected["flops"]
        assert float(row["95 % interval from"]) == expected["gain_low"]
    transferred = rows_of(rendered, "transfer-gain-on-each-student-figure-5")
    assert [row["group"] for row in transferred] == [*["smollm2-135m"] * 3, *[HOSTILE[0]] * 3]
    assert (
        float(transferred[3]["gain over self_instruct, nats per token"]) == result["transfer"][0]["methods"][0]["gain"]
    )
    equal = rows_of(rendered, "equal-tokens-gain-at-equal-response-tokens")
    assert [float(row["gain over self_instruct, nats per token"]) for row in equal] == [
        row["gain"] for row in result["equal_response_tokens"]["methods"]
    ]
    assert "by seed: 1,234, 987" in Page(rendered.html).text
    shares = rows_of(rendered, "target-kind-training-examples-of-the-target-kind")
    assert [float(row["share of the instructions of the target kind"]) for row in shares] == [0.125, 0.375, 0.625]
    assert "38% (28% to 48%)" in Page(rendered.html).text
    assert "2.7654" in Page(rendered.html).text
    montessori = result["methods"][0]
    seconds = significant(montessori["job_seconds"] / study.experiment.training.examples)
    assert montessori["method"] == "montessori"
    assert f"54.9258.596.90362.9329.9162.9758.7681.22{seconds} s5.842 s" in Page(rendered.html).text


def test_students_of_one_model_have_labels_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, result = write_study(tmp_path / "study")
    model = {"model": "smollm2-135m"}
    loras = [{"rank": 8}, {"rank": 32}]
    students = [model, model | {"max_length": 128}, {"model": "other"}, *(model | {"lora": lora} for lora in loras)]
    study = parse(Study, study.model_dump(mode="json") | {"transfer": students}, "test")
    usual = "max_length: 1024, lora: null"
    labels = [
        f"smollm2-135m ({usual}, experiment.student)",
        f"smollm2-135m ({usual}, transfer.0)",
        "smollm2-135m (max_length: 128, lora: null)",
        "other",
        *(f"smollm2-135m (max_length: 1024, lora.rank: {rank}, lora.alpha: 32, lora.targets: [])" for rank in (8, 32)),
    ]
    assert study.student_labels() == labels
    (transferred,) = (other["methods"] for other in result["transfer"])
    result["transfer"] = [{"student": label, "methods": transferred} for label in labels[1:]]
    rendered = study_page(study, result, tmp_path / "study")
    drawn = rows_of(rendered, "transfer-gain-on-each-student-figure-5")
    assert [row["group"] for row in drawn] == [label for label in labels for _ in METHODS]
    write_json(result, tmp_path / "study" / "comparison.json")
    print_comparison(tmp_path / "study")
    printed = capsys.readouterr().out
    assert all(printed.count(f"transfer to {label}") == 1 for label in labels[1:])


def test_scores_of_all_students_of_a_study_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, result = write_study(tmp_path / "study")
    result["untrained_scores"] = [benchmark_score("arc_challenge", "acc_norm", 0.271, 0.01, 1172)]
    result["transfer"][0]["methods"][2]["scores"] = [benchmark_score("arc_challenge", "acc_norm", 0.424, None, 1172)]
    text = Page(study_page(study, result, tmp_path / "study").html).text
    assert "untrained student0.271 ± 0.010–\nmontessori––\nself_instruct0.314 ± 0.010–\nnomad––\n" in text
    assert f"Benchmarks of {HOSTILE[0]}" in text
    assert "nomad0.424" in text
    write_json(result, tmp_path / "study" / "comparison.json")
    print_comparison(tmp_path / "study")
    printed = capsys.readouterr().out
    for score in ("0.271 ± 0.010", "0.314 ± 0.010", "0.424"):
        assert printed.count(score) == 1


def test_study_page_shows_what_the_teacher_learned(tmp_path: Path) -> None:
    study, result = write_study(tmp_path / "study")
    folder = tmp_path / "study"
    rendered = study_page(study, result, folder)
    tables = {
        method: [
            read_table(folder / row["table"], INFLUENCE)["influence_student"].drop_null().to_numpy()
            for seed in result["teachers"]
            for row in seed["influence"]
            if row["method"] == method
        ]
        for method in METHODS[:2]
    }
    drawn = rows_of(rendered, "learning-influence-of-what-each-method-trains-on-figure-3c")
    for method, values in tables.items():
        assert sum(int(row["examples"]) for row in drawn if row["set"] == method) == sum(map(len, values)) == 78
    helpful = [(int((values > -4e-4).sum()), len(values)) for values in tables["montessori"]]
    (low, high), total = share_interval_of_seeds(helpful), sum(part for part, _ in helpful)
    assert low < share_interval(total, 78)[0]  # the seeds differ
    share = f"{formatting.share(total / 78)} ({formatting.share(low)} to {formatting.share(high)})"
    assert f"montessori78{share}" in Page(rendered.html).text
    shares = rows_of(rendered, "learning-share-of-positive-influence-per-training-batch-figure-3d")
    first = [row for row in shares if row["batch"] == "1"]
    for row in first:
        expected = np.mean([(values[:32] > 0).mean() for values in tables[row["line"]]])
        assert float(row["share of positive influence"]) == pytest.approx(expected)
    (name,) = (name for name in rendered.data if "checkpoints" in name)
    dots = [(row["line"], row["DPO reward margin"]) for row in rows_of(rendered, name)]
    assert dots == [("seed 0", "0.3"), ("seed 0", "0.6"), ("seed 1", "0.3"), ("seed 1", "0.6")]
    text = Page(rendered.html).text
    helpful = sum(int((values > -4e-4).sum()) for values in tables["montessori"])
    assert f"montessori78{formatting.share(helpful / 78)}" in text
    assert "instructions, per example1.50 s0.37 s0.37 s" in text  # of Table 7, mean of two seeds
    result["teachers"] = [seed | {"influence": [], "checkpoints": []} for seed in result["teachers"]]
    assert not [name for name in study_page(study, result, folder).data if name.startswith("learning")]


def test_study_page_shows_papers_results_of_same_rounds(tmp_path: Path) -> None:
    study, result = write_study(tmp_path / "study")
    result["methods"] += [result["methods"][0] | {"method": name} for name in ("self_reward", "llm2llm")]

    def shown(**changes: object) -> str:
        changed = study.model_copy(update={"experiment": study.experiment.model_copy(update=changes)})
        assert LLM2LLM.rounds(changed.experiment) == SELF_REWARD.rounds(changed.experiment) == 2  # as in Section 4
        return Page(study_page(changed, result, tmp_path / "study").html).text

    text = shown(judge=Endpoint(model="gpt-4o"))
    assert "Table 1, iteration 154.9258.596.903" in text  # montessori
    assert "Table 1, iteration 253.4957.326.798" in text  # self_reward
    assert "Table 1, iteration 252.6355.026.519" in text  # llm2llm
    assert "Table 6, iteration 22.694.715.428" in shown()  # self_reward without a judge
    assert "5.842 s" in text
    text = shown(iterations=2)
    assert "Table 1, iteration 256.3760.157.163" in text
    assert "5.842 s" not in text  # of one iteration
    text = shown(iterations=3)
    assert "54.92" not in text
    assert "56.37" not in text


@pytest.mark.parametrize("diverged", [METHODS[:1], METHODS], ids=["one method", "all methods"])
def test_diverged_students_do_not_break_page(tmp_path: Path, diverged: tuple[str, ...]) -> None:
    study, result = write_study(tmp_path / "study")
    for row in result["methods"]:
        if row["method"] in diverged:
            row |= dict.fromkeys(("held_out_loss", "gain", "gain_low", "gain_high", "spread_over_seeds"), math.nan)
    result["teachers"][0]["checkpoints"][0] |= dict.fromkeys(("margin", "held_out_loss", "gain"), math.nan)
    result["teachers"][0]["checkpoints"][1] |= dict.fromkeys(("margin", "held_out_loss", "gain"))
    rendered = study_page(study, result, tmp_path / "study")
    page = Page(rendered.html)
    assert len(page.plots) == 11
    assert "nan" not in page.text
    assert [row[""] for row in rows_of(rendered, "gain-of-each-method")] == [m for m in METHODS if m not in diverged]
    colours = [
        {trace["name"]: trace["marker"]["color"] for trace in plot["data"] if trace.get("mode") == "markers+text"}
        for plot in page.plots
    ]
    for method in METHODS:  # one colour in all figures
        assert len({found[method] for found in colours if method in found}) == 1


def test_norm_sim_curve_is_cumulative_share(study: pages.Page) -> None:
    (name,) = (name for name in study.data if name.startswith("norm-sim"))
    curve = [row for row in rows_of(study, name) if row["line"] == "seed-0, round-1"]
    values = np.array([(i * 37 % 500) / 500 for i in range(500)])
    assert len(curve) == 200
    for row in curve:
        assert (values >= float(row["NormSim"])).mean() == pytest.approx(float(row["share of the examples"]))


def test_runs_page_shows_differences(runs: pages.Page) -> None:
    page = Page(runs.html)
    assert "warmup.learning_rate: 5e-06 -> 2e-05" in page.text
    assert "preferences.baseline: 'median' -> 'student'" in page.text
    assert "iterations: 2 -> 1" in page.text
    gains = {
        row[""]: float(row["gain, nats per token"])
        for row in rows_of(runs, "held-out-paired-gain-of-the-updated-teacher-s-student")
    }
    assert gains["first, iteration 1: over the unmodified teacher's student"] == 0.02
    assert gains["second: over the unmodified teacher's student"] == 0.02
    cost = {row["run"]: float(row["seconds"]) for row in rows_of(runs, "cost-seconds-of-jobs")}
    assert cost == {"first": 2 * 7275.5, "second": 7275.5}
    assert "alert" not in page.text  # this page has no model text


def test_runs_with_equal_names_show_folders(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / part / "run") for part in ("a", "b")]
    page = Page(render_runs(folders).html)
    assert all(str(folder) in page.text for folder in folders)
    assert "The runs have the same configuration." in page.text


def test_run_given_twice_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    code, output = invoke("report", "run", "./run/../run", cwd=tmp_path)
    assert (code, "given twice; name each run once" in output) == (1, True)


def test_one_command_writes_every_kind_of_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    copy = shutil.copytree(run, tmp_path / "copy")
    write_study(tmp_path / "study")

    def report(*arguments: object, command: Callable[..., tuple[int, str]] = invoke) -> str:
        code, output = command("report", *map(str, arguments), cwd=tmp_path)
        assert code == 0, output
        return output

    assert "report.html" in report(run, command=call)
    for _ in range(2):
        report(run, "--out", tmp_path / "elsewhere" / "mine.html")
    report(run, copy)
    report(tmp_path / "study")
    titles = {
        run / "report.html": "Montessori report",
        tmp_path / "elsewhere" / "mine.html": "Montessori report",
        tmp_path / "comparison-of-runs.html": "Montessori comparison of runs",
        tmp_path / "study" / "comparison.html": "Montessori comparison of methods",
    }
    for path, title in titles.items():
        assert f"{title}</title>" in path.read_text()
        assert list(path.with_name(f"{path.stem}-data").glob("*.csv"))
    assert (run / "report.html").read_text() == (tmp_path / "elsewhere" / "mine.html").read_text()


def test_every_figure_has_its_own_csv_file() -> None:
    """Letters that a file name lacks may be all that tells titles apart."""
    bars = {"mmlu_pro": 1.0, "mmlu-pro": 2.0, "数学": 3.0, "物理": 4.0}
    figures = [bar_figure(title, "", "score", {"x": value}, str) for title, value in bars.items()]
    page = pages.build_page(
        "Montessori report",
        "t",
        [],
        [pages.Section("overview", ""), pages.Section("scores", "", [pages.Block(figures)])],
    )
    assert [float(text.splitlines()[1].split(",")[1]) for text in page.data.values()] == list(bars.values())
    assert [*page.data] == ["scores-mmlu-pro", "scores-mmlu-pro-2", "scores", "scores-2"]
    assert re.findall(r'data-name="(.+)[.]csv"', page.html) == [*page.data]


def test_own_page_is_known_whatever_its_title(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    pages.build_page(
        "Montessori comparison of runs", "run · " * 2000, [], [pages.Section("overview", "Overview")]
    ).write(page)
    assert pages.is_page(page)
    for text, own in (
        ("<title>a – Montessori report</title>", True),  # of an earlier version
        ('<meta name="generator" content="Hugo"><title>School</title>', False),
    ):
        page.write_text(text)
        assert pages.is_page(page) == own


def test_unwritable_page_is_named_with_remedy(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    code, output = invoke("report", str(run), "--out", str(run / "config.yaml" / "mine.html"), cwd=tmp_path)
    assert code == 1
    assert re.search(r"config\.yaml/mine\.html: cannot be written \(.*\); name another file with --out", output)
    mine = tmp_path / "mine.html"
    mine.write_text("<title>Mine</title>")
    code, output = invoke("report", str(run), "--out", "mine.html", cwd=tmp_path)
    assert code == 1
    assert "exists and is not a Montessori report; nothing is overwritten" in output
    assert mine.read_text() == "<title>Mine</title>"
    code, output = invoke("report", str(run), "--out", str(run / "config.yaml"), cwd=tmp_path)
    assert code == 1
    assert "end in .html" in output
