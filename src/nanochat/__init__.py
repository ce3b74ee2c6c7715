"""nanochat's model, optimizers, data, evaluation, checkpoints and engine. It does not know the marketplace."""
