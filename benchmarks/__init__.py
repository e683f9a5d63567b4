"""Benchmarks of the HTTP tier. Each module runs by itself: `python -m benchmarks.<name>`; README.md explains them."""
