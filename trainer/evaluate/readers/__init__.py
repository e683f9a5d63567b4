"""Files of benchmarks, as their authors publish them and users keep them -> items. Nothing here asks a model."""
