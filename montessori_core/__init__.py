"""The Montessori-Instruct method in Python and torch, independent of Prefect and of any scheduler."""
