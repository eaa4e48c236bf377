"""Self-contained HTML reports of a run, of several runs and of a study. Imports only montessori_core."""
