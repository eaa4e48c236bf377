"""The sections of a run's page, a module each."""
