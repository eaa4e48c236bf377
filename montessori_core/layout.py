"""Names of files and folders that a run consists of."""

LOG_FILE = "training_log.json"  # one entry an optimizer step
COUNTS_FILE = "training_counts.json"  # how many examples could be used
MOMENTS_FILE = "adamw.safetensors"  # AdamW's moments, per parameter
KEPT = "kept"  # folder of models on the way, one a folder step-N
