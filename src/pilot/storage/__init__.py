"""What a validator and a miner keep on disk."""
