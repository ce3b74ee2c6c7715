"""Carry messages over HTTP. Only this package knows sockets and signatures; it hands typed, verified values inwards.

auth        signed envelopes and requests (btauth/1), and who may call
streaming   bodies off the event loop, with a minimum rate
tls         certificates
wallets     key files
client/     the validator's calls to miners, and a miner's calls to its validator
server/     the miner's axon, and the validator's gateway for miners that announce themselves or pull
"""
