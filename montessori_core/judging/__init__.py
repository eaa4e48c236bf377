"""Judges behind an API: how they are asked, and how their verdicts are read."""
