"""What a run leaves: models, adapters and their cards, merged and quantized folders. May import `trainer.methods`."""
