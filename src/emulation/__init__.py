"""Days of a marketplace in seconds: the real market and real miners under a virtual clock, an emulated network between.

costs    what computing takes: seconds a micro-batch and a megabyte, printed, never measured on the way
traces   who was up when, as a CSV file; made by a seed, or taken from the world
world    plays a trace: machines come, are told to go or vanish, return
"""
