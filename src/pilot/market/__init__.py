"""The validator's side of a round. No sockets, files, clocks or global randomness."""
