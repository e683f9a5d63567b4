"""Examples -> batches -> loss -> optimizer steps, exact however they are cut. May import `trainer.examples`."""
