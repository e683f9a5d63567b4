"""The commands of `python -m trainer`, a module per group. Each has `add(commands, shared)`; work is imported late."""
