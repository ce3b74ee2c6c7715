"""Pilot, a gradient marketplace: everything behind the programs src/validator.py and src/miner.py.

interfaces    every seam in one place, and the values that cross it
common        hashing, atomic files, limits, units, the registry of plug-ins
codec         gradients and deltas to bytes and back
aggregation   contributions to one gradient
ranking       evidence to scores and weights
training      the model, its versions, gradients, DiLoCo; shared by validator, miner and plain training
market        the validator's side of a round
worker        the miner's side of a round
transport     HTTP: signed requests, streamed bodies, servers and clients
storage       the ledger, payloads, snapshots, and what a miner keeps
display       the terminal, metrics, plots
simulation    virtual time, an emulated network, machines that fail
app           flags, and the parts put together
"""
