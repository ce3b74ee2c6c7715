"""A bad line between a validator and a miner: the one that scripts/chaos.py has."""

from pilot.simulation.chaos.proxy import Line, line_to

__all__ = ["Line", "line_to"]
