"""Models: where they come from, how they are loaded, and the tokens they are given."""
