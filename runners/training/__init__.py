"""The training run: config, set-up, loop, optimizers, checkpoints, metrics."""
