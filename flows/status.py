"""What a run looks like from outside: the state of its stages, and the summary at its end."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.fanout import Ledger
from cluster.stage import Stage
from montessori_core.atomic import read_json
from tasks.run import Run, stage_seconds


def show_status(run: Run, console: Console) -> None:
    """Print a line for each stage, and one for each failed shard."""
    table = Table(
        "stage", "shards done", "rows done", "job seconds", "state", title=f"{run.experiment.name} ({run.folder})"
    )
    failures: list[tuple[str, Path]] = []
    stages = sorted(run.folder.rglob("stage.json"), key=lambda path: path.stat().st_mtime)
    for path in stages:
        folder = path.parent
        stage = Stage.read(folder)
        shards = read_json(path)["shards"]
        done = rows_done = rows = 0
        for index in range(shards):
            shard = read_json(stage.shard_file(index))
            rows += len(shard["rows"])
            if stage.is_done(index, shard["key"]):
                done += 1
                rows_done += len(shard["rows"])
            else:
                rows_done += min((read_json(stage.progress_file(index)) or {"done": 0})["done"], len(shard["rows"]))
                if stage.failure_file(index).exists():
                    failures.append((f"{folder.relative_to(run.folder)}, shard {index}", stage.failure_file(index)))
        working = any(not submission.closed for submission in Ledger(folder / "jobs").submissions)
        state = "done" if done == shards else ("jobs submitted" if working else "incomplete")
        table.add_row(
            str(folder.relative_to(run.folder)),
            f"{done}/{shards}",
            f"{rows_done}/{rows}",
            f"{stage_seconds(folder):.0f}",
            state,
        )
    console.print(table)
    for name, file in failures:
        failure = read_json(file)
        console.print(f"failed: {name}: {failure['class']}: {failure['error']}", markup=False, soft_wrap=True)
        console.print(f"  traceback: {file}", soft_wrap=True)
    if not stages:
        console.print("no stage has begun")


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
        console.print(table)
    console.print(f"report: {run.folder / 'report.html'}", soft_wrap=True)
