"""Which weights are trained, what cannot work, and who serves the result. Knows no data and no loop."""
