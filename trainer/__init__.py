"""Fine-tuning: data in, run folder out, and `publish` into the registry that the server reads.

Each folder says what lives in it and what it may import; `train` is the reading order of a run.
"""
