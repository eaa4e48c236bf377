"""Run a stage on machines: shards and their commits, local and Slurm jobs, and the fan-out that drives them."""
