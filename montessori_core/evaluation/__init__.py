"""Benchmarks (Section 4.2) and the statistics of a study."""
