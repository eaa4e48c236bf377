"""What a model is measured by beside its held-out loss (Section 4.2), and whether data holds what is asked there."""
