"""The log that a training leaves beside the model: one entry an optimizer step."""

LOG_FILE = "training_log.json"
