"""How good a model is: items read from benchmark files, asked of a running engine or a URL, and scored."""
