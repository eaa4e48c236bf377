"""Rich tables of the command line.

Functions import slow libraries (scipy, plotly, simpy, torch) where they need them, so `montessori status` starts at once.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table

from cluster.status import stages_of
from cluster.usage import cost_of, use_of
from flows.cli.console import console
from flows.cli.options import warn
from montessori_core import layout
from montessori_core.config import Experiment
from montessori_core.files import read_json
from montessori_core.formatting import (
    copies_by_benchmark,
    duration,
    gain_text,
    interval_text,
    kind_text,
    score_name,
    score_text,
    share,
    spread_text,
)
from montessori_core.influence.preferences import threshold_of
from montessori_core.influence.table import describe_influence, influence_warnings, share_label, summarize_influence
from montessori_core.models.shape import GB
from montessori_core.speed import usable_cores
from tasks.run import Run
from tasks.studies import PAGE, read_comparison, unused_stages

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flows.estimate import Estimate
    from flows.forecast import Forecast
    from montessori_core.evaluation.kinds import KindClassifier
    from montessori_core.influence.memory import MemoryPlan
    from montessori_core.training.memory import UpdateMemory


def print_estimate(experiment: Experiment, estimate: "Estimate") -> None:
    """Print the stages of a run with their sizes and, if the speed is known, their times."""
    title = f"{experiment.name}: teacher {experiment.teacher.model}, student {experiment.student.model}"
    table = Table(title=title, title_justify="left")
    header, *rows = estimate.table()
    for column in header:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for sentence in estimate.left_out(experiment):
        console.print(sentence, soft_wrap=True)
    if estimate.seconds is not None:
        console.print(
            f"about {duration(estimate.seconds)} in total, "
            f"at {estimate.gflops:.0f} GFLOP/s (fp32 matrix product, measured on this machine)"
        )
        threads, cores = experiment.cluster.resources.training.cpus_per_process, usable_cores()
        if cores > threads:
            console.print(
                f"A job uses {threads} of this machine's {cores} cores. For all of them add --set "
                f"'cluster.resources.*.cpus_per_process={cores}'",
                soft_wrap=True,
            )
    else:
        console.print(
            "to estimate the time from a small finished run: montessori forecast CONFIG --pilot RUN_DIR", soft_wrap=True
        )


def print_summary(run: Run) -> None:
    """Print the results of each finished iteration, and the path of the report."""
    from montessori_core.evaluation.kinds import read_classifier

    classifier = read_classifier(run.folder)
    for number in range(1, run.experiment.iterations + 1):
        metrics = read_json(run.iteration(number) / layout.METRICS)
        if metrics is None:
            continue
        table = Table(show_header=False, title=f"{run.experiment.name}, iteration {number}", title_justify="left")
        for name, funnel in metrics["synthesis"].items():
            steps = ", ".join(f"{count} {step}" for step, count in funnel.items())
            table.add_row(f"synthesis, {name} set", steps)
        table.add_row(
            "preference pairs", f"{metrics['preferences']['pairs']} from {metrics['preferences']['prompts']} prompts"
        )
        probing, training = metrics["influence"]["probing"], metrics["influence"].get("training")
        after = f"{training['share_positive']:.0%} after" if training else "not measured after"
        table.add_row(
            share_label(run.experiment.preferences.baseline),
            f"{probing['share_positive']:.0%} before the teacher update, {after}",
        )
        if classifier is not None:
            table.add_row("instructions of the target kind", _kind_shares(run, number, classifier))
        titles = {
            "untrained": "held-out loss, untrained student",
            "unmodified": "held-out loss, student of the unmodified teacher",
            "student": "held-out loss, student of the updated teacher",
        }
        for name, title in titles.items():
            if name in metrics["held_out_loss"]:
                loss = metrics["held_out_loss"][name]
                table.add_row(title, f"{loss['mean']:.4f} nats per token (standard error {loss['standard_error']:.4f})")
        if "student_over_unmodified" in metrics["held_out_gain"]:
            gain = metrics["held_out_gain"]["student_over_unmodified"]
            table.add_row(
                "gain of the updated over the unmodified teacher's data",
                f"{gain['mean']:+.4f} nats per token (standard error over examples {gain['standard_error']:.4f}, paired)",
            )
        scores: dict[str, list[str]] = {}
        for score in metrics.get("scores", []):
            if score["mean"] is not None:
                text = f"{score['mean']:.4f} {score['model']}"
                scores.setdefault(score_name(score["benchmark"], score["metric"]), []).append(text)
        for name, texts in scores.items():
            table.add_row(name, ", ".join(texts))
        console.print(table)
    _print_times(run)
    console.print(f"report: {run.folder / layout.REPORT}", soft_wrap=True)


def _kind_shares(run: Run, number: int, classifier: "KindClassifier") -> str:
    """Return the shares of the unmodified teacher and of the teacher after an iteration's update, or why not."""
    from montessori_core.evaluation.kinds import read_instructions

    if not classifier.usable:
        return f"not shown: {classifier.objection}"
    folders = run.iteration(1), run.iteration(number) / "training"
    before, after = (classifier.share(read_instructions(folder / layout.EXAMPLES)) for folder in folders)
    return (
        f"{share(before.value)} before the teacher update, {share(after.value)} after (classifier: "
        f"{classifier.balanced_accuracy:.2f} balanced accuracy)"
    )


def _print_times(run: Run) -> None:
    """Print the time of each stage."""
    costs = {folder: cost for folder in stages_of(run.folder) if (cost := cost_of(folder))}
    if not costs:
        return
    table = Table(title="time of each stage", title_justify="left")
    for column in ("stage", "rows", "seconds", "job seconds"):
        table.add_column(column, no_wrap=True)
    uses = {folder: use_of(folder) for folder in costs}
    left_out = unused_stages(run)
    unused = {folder: costs.pop(folder) for folder in list(costs) if folder in left_out}
    for folder, cost in costs.items():
        name, seconds = str(folder.relative_to(run.folder)), cost.ended - cost.begun
        table.add_row(name, f"{cost.rows:,}", _seconds(seconds), _seconds(uses[folder].seconds))
    table.add_section()
    seconds = max(cost.ended for cost in costs.values()) - min(cost.begun for cost in costs.values())
    table.add_row("all stages", "", _seconds(seconds), _seconds(sum(uses[folder].seconds for folder in costs)))
    if unused:
        table.add_row("of earlier settings", "", "", _seconds(sum(uses[folder].seconds for folder in unused)))
    console.print(table)
    console.print("seconds: wall time from a stage's first job to its last result, including pauses of the run")


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def print_comparison(folder: Path) -> None:
    """Print the result of a study."""
    result = read_comparison(folder)
    tables = {f"{result['study']}: seeds {', '.join(map(str, result['seeds']))}": result["methods"]}
    if (equal := result.get("equal_response_tokens")) and equal["methods"]:
        tables[f"at equal response tokens: {', '.join(f'{limit:,}' for limit in equal['limits'])}"] = equal["methods"]
    tables |= {f"transfer to {other['student']}": other["methods"] for other in result["transfer"]}
    for title, rows in tables.items():
        lines = [
            {
                "method": row["method"],
                "held-out loss": f"{row['held_out_loss']:.4f}",
                "gain": gain_text(row),
                "95 % interval": interval_text(row),
                "spread over seeds": spread_text(row),
                "target kind": kind_text(row),
                "job seconds": f"{row['job_seconds']:,.0f}",
                "FLOPs": f"{row['flops']:.2e}",
            }
            for row in rows
        ]
        # Without a usable classifier, and for another student of the same data, there is no share.
        columns = [name for name in lines[0] if name != "target kind" or any(line[name] for line in lines)]
        table = Table(*columns, title=title, title_justify="left")
        for line in lines:
            table.add_row(*(line[name] for name in columns))
        console.print(table)
    untrained = {"method": "untrained student", "scores": result.get("untrained_scores", [])}
    _print_scores("benchmarks: means over the seeds", [untrained, *result["methods"]])
    for other in result["transfer"]:
        _print_scores(f"benchmarks, transfer to {other['student']}", other["methods"])
    _print_copies(result["methods"])
    if objection := (result.get("kind_classifier") or {}).get("objection"):
        console.print(f"the share of instructions of the target kind is not shown: {objection}", soft_wrap=True)
    console.print(f"untrained student: {result['untrained_loss']:.4f}")
    console.print(f"comparison: {folder / PAGE}", soft_wrap=True)


def _print_scores(title: str, rows: "Sequence[dict[str, Any]]") -> None:
    """Print a row per benchmark score and a column per method that has scores."""
    scores = {
        row["method"]: {score_name(entry["benchmark"], entry["metric"]): entry for entry in row["scores"]}
        for row in rows
        if row.get("scores")
    }
    if not scores:
        return
    table = Table("benchmark", *scores, title=title, title_justify="left")
    for name in dict.fromkeys(name for of_method in scores.values() for name in of_method):
        table.add_row(name, *(score_text(of_method.get(name)) for of_method in scores.values()))
    console.print(table)


def _print_copies(rows: "Sequence[dict[str, Any]]") -> None:
    """Print how many items of each benchmark the training sets of each method share."""
    copies = {row["method"]: of_method for row in rows if (of_method := copies_by_benchmark(row))}
    if not copies:
        return
    table = Table(
        "benchmark", *copies, title="items that the training sets share, over all seeds", title_justify="left"
    )
    for name in next(iter(copies.values())):
        table.add_row(name, *(of_method[name] for of_method in copies.values()))
    console.print(table)


def print_memory_plan(plan: "MemoryPlan", title: str, memory_gb: float) -> None:
    """Print the memory that measuring influence needs, by item and place."""
    from montessori_core.influence.memory import PHASES

    table = Table("item", "GB", "place", "while", title=title, title_justify="left")
    for need in plan.needs:
        pinned = ", pinned" if need.pinned else ""
        when = "" if need.phases == PHASES else need.phases[0]
        table.add_row(need.name, f"{need.size / GB:.2f}", need.home + pinned, when)
    table.add_section()
    table.add_row("most on the device", f"{plan.device / GB:.2f}", f"of {memory_gb:g} GB", "")
    table.add_row("most in host memory", f"{plan.host / GB:.2f}", "per worker", "")
    console.print(table)
    if not plan.fits:
        console.print(
            f"does not fit: what must be on the device needs {plan.device / GB:.1f} GB. Lower "
            "--max-length or --reference-batch-tokens, train LoRA matrices (--lora-rank), or use --dtype bfloat16",
            style="red",
        )


def print_update_plans(
    plans: "Mapping[str, UpdateMemory]", title: str, memory_gb: float, fitting: "Sequence[str]"
) -> None:
    """Print the memory of a GPU that updates a teacher, by item, for each number of GPUs and ZeRO stage."""
    table = Table("item", *plans, title=title, title_justify="left")
    for item in ("weights", "gradients", "buckets", "optimizer", "temporary", "total"):
        table.add_row(item, *(f"{getattr(plan, item) / GB:.2f}" for plan in plans.values()))
    console.print(table)
    if fitting:
        console.print(f"fits {memory_gb:g} GB: {'; '.join(fitting)}")
    else:
        console.print(
            f"does not fit {memory_gb:g} GB: train LoRA matrices (--lora-rank) or lower --max-length",
            style="red",
        )


def print_forecasts(forecasts: "Sequence[Forecast]") -> None:
    """Print the stages on the first cluster, then the totals on each cluster."""
    _print_stages(forecasts[0])
    table = Table(
        *("nodes", "wall time", "10 % to 90 % of simulations", "job hours", "GPU hours", "10 % to 90 %"),
        title="the whole experiment: medians",
        title_justify="left",
    )
    for forecast in forecasts:
        low, middle, high = (duration(3600 * forecast.hours("wall", share)) for share in (0.1, 0.5, 0.9))
        table.add_row(
            str(forecast.machines.nodes),
            middle,
            f"{low} to {high}",
            f"{forecast.hours('job', 0.5):.1f}",
            f"{forecast.hours('gpu', 0.5):.1f}",
            f"{forecast.hours('gpu', 0.1):.1f} to {forecast.hours('gpu', 0.9):.1f}",
        )
    console.print(table)
    for forecast in forecasts:
        stage = forecast.longest()
        work = forecast.stages[stage]
        at_once, reason = forecast.jobs_at_once(stage)
        console.print(
            f"nodes: {forecast.machines.nodes}: the longest stage is {work.name}, {duration(forecast.mean(stage).seconds)}, "
            f"with {at_once} of its {len(work.jobs)} jobs at a time: {reason}",
            soft_wrap=True,
        )
    console.print("lost: share of job hours. requeued: mean requeues of a job.", soft_wrap=True)


def _print_stages(forecast: "Forecast") -> None:
    machines = forecast.machines
    cluster = f"nodes: {machines.nodes}, each with {machines.gpus} GPUs and {machines.cpus} cores"
    table = Table(title=f"{cluster}: means of {len(forecast.timings)} simulations", title_justify="left")
    table.add_column("stage", no_wrap=True)
    for name in ("jobs", "at a time", "wall time", "job hours", "GPU hours", "lost", "requeued"):
        table.add_column(name)
    for stage, work in enumerate(forecast.stages):
        mean = forecast.mean(stage)
        table.add_row(
            work.name,
            str(len(work.jobs)),
            str(forecast.jobs_at_once(stage)[0]),
            duration(mean.seconds),
            f"{mean.job_seconds / 3600:.2f}",
            f"{forecast.gpu_hours(stage):.2f}",
            f"{max(0.0, mean.lost_seconds) / mean.job_seconds:.1%}",
            f"{mean.restarts / len(work.jobs):.2f}",
        )
    console.print(table)


_BLOCKS = " ▁▂▃▄▅▆▇█"


def print_influence(table: pa.Table, baseline: str) -> None:
    """Print a summary of an influence table."""
    from montessori_core.influence.screening import screening_report

    summary = summarize_influence(table, threshold_of(table, baseline))
    values = table["influence_student"].drop_null().to_numpy()
    lines = Table(show_header=False)
    for name, text in describe_influence(summary, baseline):
        lines.add_row(name, text)
    for status in ("no_response_tokens", "non_finite"):
        ids = table["example_id"].filter(pc.equal(table["status"], status)).to_pylist()
        if ids:
            more = ", ..." if len(ids) > 3 else ""
            lines.add_row(f"left out: {status.replace('_', ' ')}", f"{len(ids)} ({', '.join(ids[:3])}{more})")
    if len(values):
        low, median, high = np.percentile(values, [5, 50, 95])
        lines.add_row("influence, 5 % - median - 95 %", f"{low:.3g}  {median:.3g}  {high:.3g} nats per token")
        lines.add_row("distribution", _sparkline(values))
    screening = screening_report(table)
    for name, text in screening.describe() if screening else ():
        lines.add_row(name, text)
    exact = table.filter(pc.and_(pc.equal(table["status"], "ok"), pc.equal(table["estimator"], "exact")))
    read, total = exact["reference_tokens"].to_numpy().sum(), summary["reference_tokens"] * exact.num_rows
    if 0 < read < total:
        lines.add_row("reference tokens saved", f"{1 - read / total:.0%}")
    console.print(lines)
    warn(influence_warnings(summary))


def _sparkline(values: Any) -> str:
    counts, edges = np.histogram(values, bins=24)
    bars = "".join(_BLOCKS[int(np.ceil(count / counts.max() * (len(_BLOCKS) - 1)))] for count in counts)
    return f"{edges[0]:.2g} {bars} {edges[-1]:.2g}"


def print_evaluation(file: Path) -> None:
    """Print the result of an evaluation, with 95 % confidence intervals."""
    result = read_json(file)
    table = Table("benchmark", "metric", "score", "95 % interval", "over", "unparsed", box=None)
    loss = result["held_out_loss"]
    table.add_row("held-out", "loss, nats per token", *_format_mean(loss["mean"], loss["standard_error"]))
    for score in result["scores"]:
        counts = str(score["examples"]), str(score["unparsed"] or "")
        mean = _format_mean(score["mean"], score["standard_error"])
        table.add_row(score["benchmark"], score["metric"], *mean, *counts)
    console.print(table)
    console.print(f"written to {file}; the items are in Parquet files next to it", soft_wrap=True)


def _format_mean(mean: float | None, error: float | None) -> tuple[str, str]:
    if mean is None:
        return "-", ""
    return f"{mean:.4f}", "" if error is None else f"{mean - 1.96 * error:.4f} to {mean + 1.96 * error:.4f}"
