"""What a training leaves on disk beside the model's weights, and how often: what a driver without torch knows of it, too."""

LOG_FILE = "training_log.json"  # one entry an optimizer step
COUNTS_FILE = "training_counts.json"  # how many examples could be used
MOMENTS_FILE = "adamw.safetensors"  # AdamW's moments, per parameter
KEPT = "kept"  # folder of models on the way, one a folder step-N
CHECKPOINTS = 10  # evenly spread over a training
CHECKPOINT_SECONDS = 60.0  # after which one more is saved, unless saving takes long
