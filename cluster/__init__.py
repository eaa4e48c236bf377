"""How work reaches machines: shards, their commits, jobs on this machine or on Slurm, and the fan-out that drives them."""
