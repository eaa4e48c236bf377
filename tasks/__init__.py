"""Prefect tasks, one module per stage: each runs a part of the method on the cluster and publishes its results."""
