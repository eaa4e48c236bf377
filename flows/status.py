"""What a run looks like from outside: the state of its stages, and the summary at its end."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.costs import cost_of
from cluster.status import StageStatus, read_stage_status, stages_of
from cluster.usage import use_of
from montessori_core.atomic import read_json
from montessori_core.formatting import duration, gain_text, interval_text, spread_text
from tasks.run import Run, driver_of
from tasks.studies import PAGE, in_study, read_comparison


def show_status(run: Run, console: Console) -> None:
    """Print a line for each stage, and what is known of each failed shard."""
    states = [read_stage_status(folder, run.experiment.cluster) for folder in stages_of(run.folder)]
    rows = []
    for state in states:
        at_work = state.word == "at work"
        rows.append(
            {
                "stage": str(state.folder.relative_to(run.folder)),
                "state": state.word,
                "shards done": f"{state.done}/{state.shards}",
                "running": str(state.running or ""),
                "queued": str(state.queued or ""),
                "failed": str(state.failed or ""),
                "rows computed": f"{int(state.rows_done)}/{state.rows}",
                "rows/min": f"{60 * state.rows_per_second:.3g}" if at_work and state.rows_per_second else "",
                "job seconds": f"{state.job_seconds:.0f}",
                "left": _time_left(state) if at_work else "",
            }
        )
    # What nothing is said of takes no room: terminals are narrow, and stages are named in other commands as they stand here.
    columns = [name for name in (rows[0] if rows else ()) if any(row[name] for row in rows)]
    table = Table(title=f"{run.experiment.name} ({run.folder})", title_justify="left")
    for name in columns:
        table.add_column(name, no_wrap=name in ("stage", "state"))
    for row in rows:
        table.add_row(*(row[name] for name in columns))
    if rows:
        console.print(table)
    else:
        console.print(f"{run.experiment.name} ({run.folder}): no stage has begun", soft_wrap=True)
    for state in states:
        stage = state.folder.relative_to(run.folder)
        for failure in state.failures:
            console.print(f"failed: {stage}, shard {failure.shard}: {failure.kind}: {failure.error}", soft_wrap=True)
            for line in failure.last_lines:
                console.print(f"  | {line}", soft_wrap=True)
            console.print(f"  log: {failure.log}", soft_wrap=True)
    holder = driver_of(run.folder)
    if holder:
        console.print(f"driven by process {holder['process']} on {holder['host']}")
    elif in_study(run.folder):
        console.print("nobody drives this seed of a study; montessori compare goes on with it", soft_wrap=True)
    elif states and not run.finished:
        console.print(f"nobody drives this run; go on with: montessori resume {run.folder}", soft_wrap=True)


def _time_left(state: StageStatus) -> str:
    """What is left of a stage at work; of one whose jobs have computed nothing yet, that they start."""
    if state.seconds_left is not None:
        return f"about {duration(state.seconds_left)}"
    return "starting" if state.running else ""


def print_summary(run: Run, console: Console) -> None:
    """Print what came out of each finished iteration, and where the report lies."""
    for number in range(1, run.experiment.iterations + 1):
        metrics = read_json(run.iteration(number) / "metrics.json")
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
            f"share of positive influence (baseline: {run.experiment.preferences.baseline})",
            f"{probing['share_positive']:.0%} before the teacher update, {after}",
        )
        titles = {
            "untrained": "held-out loss, untrained student",
            "unmodified": "held-out loss, student of the unmodified teacher",
            "student": "held-out loss, student of the updated teacher",
        }
        for name, title in titles.items():
            if name in metrics["held_out_loss"]:
                loss = metrics["held_out_loss"][name]
                table.add_row(title, f"{loss['mean']:.4f} nats/token (standard error {loss['standard_error']:.4f})")
        if "student_over_unmodified" in metrics["held_out_gain"]:
            gain = metrics["held_out_gain"]["student_over_unmodified"]
            table.add_row(
                "gain of the updated over the unmodified teacher's data",
                f"{gain['mean']:+.4f} nats/token (standard error {gain['standard_error']:.4f}, paired)",
            )
        scores: dict[str, list[str]] = {}
        for one in metrics.get("scores", []):
            if one["mean"] is not None:
                text = f"{one['mean']:.4f} {one['model']}"
                scores.setdefault(f"{one['benchmark']}: {one['metric'].replace('_', ' ')}", []).append(text)
        for name, texts in scores.items():
            table.add_row(name, ", ".join(texts))
        console.print(table)
    _print_times(run, console)
    console.print(f"report: {run.folder / 'report.html'}", soft_wrap=True)


def _print_times(run: Run, console: Console) -> None:
    """Print how long each stage took."""
    costs = {folder: cost for folder in stages_of(run.folder) if (cost := cost_of(folder))}
    if not costs:
        return
    table = Table(title="time of each stage", title_justify="left")
    for column in ("stage", "rows", "seconds", "job seconds"):
        table.add_column(column, no_wrap=True)
    uses = {folder: use_of(folder) for folder in costs}
    for folder, cost in costs.items():
        name, seconds = str(folder.relative_to(run.folder)), cost.ended - cost.begun
        table.add_row(name, f"{cost.rows:,}", f"{seconds:,.0f}", f"{uses[folder].seconds:,.0f}")
    table.add_section()
    seconds = max(cost.ended for cost in costs.values()) - min(cost.begun for cost in costs.values())
    table.add_row("all stages", "", f"{seconds:,.0f}", f"{sum(use.seconds for use in uses.values()):,.0f}")
    console.print(table)
    console.print(
        "seconds: by the clock, from a stage's first job to its last result; pauses of the run are among them"
    )


def print_comparison(folder: Path, console: Console) -> None:
    """Print the result of a study."""
    result = read_comparison(folder)
    columns = ("method", "held-out loss", "gain", "95 % interval", "spread over seeds", "job seconds", "FLOPs")
    tables = {f"{result['study']}: seeds {', '.join(map(str, result['seeds']))}": result["methods"]}
    tables |= {f"transfer to {other['student']}": other["methods"] for other in result["transfer"]}
    for title, rows in tables.items():
        table = Table(*columns, title=title, title_justify="left")
        for row in rows:
            texts = gain_text(row), interval_text(row), spread_text(row)
            costs = f"{row['job_seconds']:,.0f}", f"{row['flops']:.2e}"
            table.add_row(row["method"], f"{row['held_out_loss']:.4f}", *texts, *costs)
        console.print(table)
    console.print(f"untrained student: {result['untrained_loss']:.4f}")
    console.print(f"comparison: {folder / PAGE}", soft_wrap=True)
