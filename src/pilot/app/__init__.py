"""Flags, and the parts of a validator and a miner put together."""
