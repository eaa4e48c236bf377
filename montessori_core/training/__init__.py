"""Training with TRL and DeepSpeed: warm-up and student training (SFT), teacher update (DPO)."""
