"""The model, its versions and its gradients: shared by validator, miner and plain training."""
