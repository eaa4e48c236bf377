"""Benchmarks (Section 4, Evaluation Methods) and the statistics of a study."""
