"""Machines and networks under virtual time, and real processes under injected faults."""
