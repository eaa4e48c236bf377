"""Which shards count as slow."""

from cluster.stragglers import Stopwatch


def test_stopwatch_ignores_shards_that_ran_before() -> None:
    """After a takeover, a shard that ends a second later did not take a second."""
    stopwatch = Stopwatch()
    stopwatch.update({0, 1, 2}, set(), 100.0)
    stopwatch.update({3, 2}, {0, 1}, 101.0)
    assert stopwatch.slower_than(4.0, 150.0) == set()  # nothing is known of the others' durations
    stopwatch.update({2}, {0, 1, 3}, 151.0)  # shard 3 took 50 seconds
    assert stopwatch.slower_than(4.0, 290.0) == set()
    assert stopwatch.slower_than(4.0, 310.0) == {2}  # since the takeover alone


def test_stopwatch_times_shard_restarted_after_takeover() -> None:
    stopwatch = Stopwatch()
    stopwatch.update({0}, set(), 100.0)
    stopwatch.update(set(), set(), 101.0)  # its job was lost
    stopwatch.update({0, 1}, set(), 110.0)
    stopwatch.update({1}, {0}, 120.0)
    assert stopwatch.slower_than(4.0, 140.0) == set()
    assert stopwatch.slower_than(4.0, 151.0) == {1}
