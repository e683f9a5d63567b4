"""What a run is told: files, flags and other tools' names -> a TrainConfig, and that -> transformers' arguments.

May import `trainer.methods.plan`; only `arguments` needs torch.
"""
