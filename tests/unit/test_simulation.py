"""The simulation of the fan-out agrees with theory and accounts for all time."""

import math
import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.simulation import ClusterSpec, FailureModel, Work, capacity, simulate
from montessori_core.errors import UserError

ONE = Work(
    name="influence",
    jobs=[[100.0]],
    spread=0.0,
    opening=20.0,
    saved_every=math.inf,
    nodes=1,
    gpus=1,
    cpus=8,
    at_once=1000,
    limit=math.inf,
    around=5.0,
)
CALM = FailureModel()
DRAWS = 1500


def mean_seconds(work: Work, disturbances: FailureModel, machines: ClusterSpec) -> tuple[float, float]:
    """Return the mean over many simulations, and four standard errors."""
    seconds = [simulate([work], machines, disturbances, seed)[0].seconds for seed in range(DRAWS)]
    return statistics.mean(seconds), 4 * statistics.stdev(seconds) / math.sqrt(DRAWS)


@pytest.mark.parametrize(
    ("machines", "at_once", "held"),
    [
        (ClusterSpec(2, 8, 64), 1000, 16),  # limited by GPUs
        (ClusterSpec(2, 8, 24), 1000, 6),  # limited by cores
        (ClusterSpec(2, 8, 64), 5, 5),  # limited by parallel_jobs
    ],
)
def test_jobs_without_failures_run_in_waves(machines: ClusterSpec, at_once: int, held: int) -> None:
    work = replace(ONE, jobs=[[60.0, 40.0]] * 50, at_once=at_once)
    first, second = simulate([work, ONE], machines, CALM, seed=0)
    assert first.seconds == pytest.approx(5 + math.ceil(50 / held) * 120)
    assert (first.job_seconds, first.restarts) == (pytest.approx(50 * 120), 0)
    assert first.lost_seconds == pytest.approx(0, abs=1e-6)
    assert second.seconds == pytest.approx(125)
    assert min(capacity(work, machines), at_once) == held


def test_time_with_failures_matches_theory() -> None:
    """Without checkpoints and with failure rate r, work of length L takes (e^{rL} - 1)(1/r + repair) on average."""
    rate, repair = 1 / 90.0, 45.0
    disturbances = FailureModel(1 / rate / 3600, 30.0, repair / 60, requeue_seconds=0.0)
    mean, tolerance = mean_seconds(ONE, disturbances, ClusterSpec(1, 1, 8))
    assert mean == pytest.approx(5 + (math.exp(rate * 120) - 1) * (1 / rate + repair), abs=tolerance)


def test_preempted_jobs_lose_unsaved_work() -> None:
    """With checkpoints every q seconds and no opening, an interval takes (e^{rq} - 1)(1/r + wait) on average."""
    rate, wait, back, piece = 1 / 40.0, 15.0, 10.0, 25.0
    work = replace(ONE, opening=0.0, saved_every=piece)
    disturbances = FailureModel(preemption_hours=1 / rate / 3600, requeue_seconds=back, queue_minutes=wait / 60)
    mean, tolerance = mean_seconds(work, disturbances, ClusterSpec(1, 1, 8))
    expected = 5 + wait + 4 * (math.exp(rate * piece) - 1) * (1 / rate + back + wait)
    assert mean == pytest.approx(expected, abs=tolerance)


def test_job_resumes_after_time_limit() -> None:
    """A job has 70 s, 20 s of them for opening: 100 s of work with checkpoints every 20 s take three starts."""
    (spent,) = simulate([replace(ONE, limit=70.0, saved_every=20.0)], ClusterSpec(1, 1, 8), CALM, seed=0)
    assert (spent.restarts, spent.seconds) == (2, pytest.approx(5 + 70 + 120 + 70 + 120 + 40))
    assert spent.lost_seconds == pytest.approx(10 + 20 + 10 + 20)


def test_multi_node_job_fails_with_any_node() -> None:
    """Two nodes fail twice as often as one; there are no checkpoints and no repair time."""
    rate = 1 / 200.0
    disturbances = FailureModel(1 / rate / 3600, notice_seconds=0.0, repair_minutes=0.0, requeue_seconds=0.0)
    mean, tolerance = mean_seconds(replace(ONE, nodes=2), disturbances, ClusterSpec(2, 1, 8))
    assert mean == pytest.approx(5 + (math.exp(2 * rate * 120) - 1) / (2 * rate), abs=tolerance)


def test_spread_keeps_mean_and_last_job_decides() -> None:
    work = replace(ONE, jobs=[[100.0]] * 8, spread=0.3)
    spent = [simulate([work], ClusterSpec(1, 8, 64), CALM, seed)[0] for seed in range(DRAWS)]
    assert statistics.mean(one.job_seconds for one in spent) == pytest.approx(8 * 120, rel=0.01)
    assert statistics.mean(one.seconds for one in spent) > 5 + 20 + 130


WORKS = st.builds(
    replace,
    st.just(ONE),
    jobs=st.lists(st.lists(st.floats(1, 50), min_size=1, max_size=4), min_size=1, max_size=12),
    saved_every=st.sampled_from([3.0, 10.0, math.inf]),
    nodes=st.integers(1, 2),
    at_once=st.integers(1, 6),
    limit=st.sampled_from([80.0, math.inf]),
)


@given(
    st.lists(WORKS, min_size=1, max_size=3),
    st.sampled_from([0.02, 0.2, math.inf]),
    st.sampled_from([0.02, 0.2, math.inf]),
    st.sampled_from([0.0, 0.5]),
    st.integers(0, 2**32),
)
def test_all_seconds_are_accounted_for(
    works: list[Work], failures: float, preemptions: float, queue: float, seed: int
) -> None:
    machines, disturbances = ClusterSpec(4, 2, 16), FailureModel(failures, 20.0, 1.0, preemptions, 5.0, queue)
    spent = simulate(works, machines, disturbances, seed)
    assert spent == simulate(works, machines, disturbances, seed)
    for work, own in zip(works, spent, strict=True):
        needed = sum(map(sum, work.jobs)) + work.opening * len(work.jobs)
        # A first start that fails while its program opens loses less than one opening.
        assert own.job_seconds == pytest.approx(needed + own.lost_seconds)
        if not own.restarts:
            assert own.lost_seconds == pytest.approx(0, abs=1e-6)
        together = min(capacity(work, machines), work.at_once)
        assert own.seconds >= own.job_seconds / together + work.around - 1e-6


def test_impossible_simulation_is_refused_with_remedy() -> None:
    machines = ClusterSpec(2, 8, 64)
    for work, remedy in (
        (replace(ONE, gpus=9), "9 GPUs"),
        (replace(ONE, nodes=3), "there are 2"),
        (replace(ONE, limit=120.0), "raise time_limit_minutes"),
        (replace(ONE, jobs=[[99.0]] * 50, spread=0.3, limit=120.0), "raise time_limit_minutes"),  # some are longer
    ):
        with pytest.raises(UserError, match=remedy):
            simulate([work], machines, CALM, seed=0)
    with pytest.raises(UserError, match="hardly ever progress"):
        simulate([ONE], machines, FailureModel(preemption_hours=10 / 3600), seed=0)
    simulate([replace(ONE, limit=121.0)], machines, CALM, seed=0)  # is possible
