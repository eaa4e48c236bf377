"""Choose training data from a pool of scored examples."""
