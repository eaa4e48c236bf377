"""LLM judges behind an API: prompts, requests, and parsing of verdicts."""
