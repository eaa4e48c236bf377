"""Tables, the human-written sets, and comparison of texts."""
