"""What a given answer is worth. Pure functions: they know neither engines nor files of benchmarks (SQL reads a
database).

`docs/scores.md` has each score's formula, source and limits.
"""
