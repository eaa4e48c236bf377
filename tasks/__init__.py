"""Prefect tasks, one module a stage: each binds the method to the cluster and publishes what people want to see."""
