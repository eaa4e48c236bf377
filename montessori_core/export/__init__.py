"""Export the data of a run for other trainers: training set, preference pairs, scored examples, with a data card."""
