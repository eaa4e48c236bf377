"""Synthesis: the teacher is shown demonstrations, writes instructions, and answers those that pass the filters."""
