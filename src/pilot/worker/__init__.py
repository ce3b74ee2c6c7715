"""The miner's side of a round."""
