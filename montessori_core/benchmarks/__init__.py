"""Benchmarks whose answers a model judges, AlpacaEval 2.0 and MT-Bench, and whether data holds what they ask."""
