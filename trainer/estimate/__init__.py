"""How much memory and time a run or a server needs, said before any weights are read.

Reading order: `shape` -> `weights`, `models`, `trained`, `activations`, `output_loss` -> `training` or `serving` ->
`zero_plan`, `ladder` -> `verdict`. Everything is in bytes and follows from shapes; what had to be measured stands in
`reserve`.
"""
