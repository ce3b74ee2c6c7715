"""Load a plug-in by its name: a literal dict maps names to "module:attribute", and imports happen on use."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any


def load(kind: str, name: str, registry: Mapping[str, str], *, own: bool = False) -> Any:
    """Return the attribute that `registry` names, or with `own` the one at a user's "package.module:attribute".

    `kind` is the flag, such as "--ranking". A user's module may be in the current folder. Raises ValueError in one line
    for a name that leads nowhere.
    """
    target = registry.get(name, name if own else "")
    module, _, attribute = target.partition(":")
    if not module or not attribute:
        hint = ", or your own package.module:Class" if own else ""
        raise ValueError(f"{kind} {name[:64]}: unknown; known: {', '.join(registry)}{hint}")
    if name not in registry and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, TypeError) as error:  # TypeError: a relative module
        if name in registry:
            raise  # ours is broken: that is no user's mistake
        raise ValueError(f"{kind} {name}: {error}; it must name an importable class") from None
