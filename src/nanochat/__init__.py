"""nanochat's model, optimizers, data, evaluation, checkpoints and engine. Nothing here knows of a marketplace."""
