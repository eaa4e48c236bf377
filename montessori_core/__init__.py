"""The Montessori-Instruct method: pure Python and torch, without Prefect and without a scheduler."""

__version__ = "0.1.0"
