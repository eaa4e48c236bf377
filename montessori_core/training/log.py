"""What a training leaves beside the model: a log, one entry an optimizer step, and how many examples it could use."""

LOG_FILE = "training_log.json"
COUNTS_FILE = "training_counts.json"
