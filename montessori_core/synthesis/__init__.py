"""Synthesis: the teacher writes instructions from demonstrations, and responses to those that pass the filters."""
