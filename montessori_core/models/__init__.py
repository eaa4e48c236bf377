"""Models: download, loading, fingerprints, and tokenization."""
