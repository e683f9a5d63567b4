"""Fine-tuning: data in, run folder out, and `publish` into the registry that the server reads."""
