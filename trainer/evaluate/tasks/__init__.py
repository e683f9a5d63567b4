"""Tasks: which questions are asked of a candidate, how, and what its answers are worth."""
