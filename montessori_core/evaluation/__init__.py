"""What a model is measured by beside its held-out loss (Section 4.2), and the statistics of a study."""
