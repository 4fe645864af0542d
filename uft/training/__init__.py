"""The training loop and what stands around it: optimiser, checkpoints, hooks, signals."""
