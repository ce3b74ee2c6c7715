"""Contain what an order causes: whatever its work raises becomes a refusal, and the miner goes on.

An order comes from another machine, so no choice of numbers in it may end this process. A library may raise anything
on the way: RuntimeError where memory lacks, RecursionError, SystemExit, a panic of Rust (which is no Exception).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from pilot.interfaces import Refused
from pilot.training.executor import TimedExecutor
from protocol import Fault, ProtocolError, one_line

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Contained(Refused):
    """Refuse an order whose work failed in an unforeseen way. `__cause__` tells this miner's log what it was."""

    def __init__(self, failure: BaseException) -> None:
        super().__init__(409, "the order's work failed at this miner", Fault.MALFORMED)
        reason = (str(failure).splitlines() or [""])[0]
        self.__cause__ = RuntimeError(f"{type(failure).__name__}: {reason}")  # without the frames, which hold tensors


def contain(function: Callable[..., T], *arguments: object) -> T:
    """Call a function on an order's behalf. Raises Refused and ProtocolError only."""
    try:
        return function(*arguments)
    except (Refused, ProtocolError):
        raise
    except BaseException as error:
        logger.debug("an order's work failed", exc_info=error)
        failure = Contained(error)
    raise failure  # outside the handler, so that the error and its frames go


class ContainedExecutor(TimedExecutor):
    """A `TimedExecutor` whose functions work on orders."""

    async def run(self, phase: str, amount: float, function: Callable[..., T], *arguments: object) -> T:
        return await super().run(phase, amount, contain, function, *arguments)


def private_cause(refusal: BaseException) -> str:
    """Return in parentheses what a refusal does not say to its validator, for the miner's own log."""
    return f" ({one_line(str(refusal.__cause__))})" if refusal.__cause__ else ""
