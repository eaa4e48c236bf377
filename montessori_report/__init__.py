"""The report: self-contained HTML pages of a run, of several runs, and of a study. Imports montessori_core alone."""
