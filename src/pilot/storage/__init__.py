"""What a run and a miner keep on disk."""

LEDGER = "ledger.sqlite"  # the name of the ledger's file in a run's folder
