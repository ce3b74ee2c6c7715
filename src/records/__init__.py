"""What is kept: the ledger, snapshots, spooled payloads, the miner's cache, metrics, and what a person sees of them."""
