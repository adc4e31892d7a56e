"""Functions of a higher package that a lower one calls without importing it: entry points of the group `dpkd.bridges`.

`evaluate` reads a teacher cache and `distill` scores text this way. Each bridge is one line under
`[project.entry-points."dpkd.bridges"]` in pyproject.toml, so the installed package says what joins two packages.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from dpkd.core.errors import UserError

GROUP = "dpkd.bridges"


def load_bridge(name: str) -> Callable[..., Any]:
    """The function registered as `name`; raises `UserError` if this installation of dpkd does not register it."""
    registered = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in registered:
        raise UserError(
            f"the installation of dpkd is incomplete: it does not register {name!r}",
            found=", ".join(sorted(registered)) or "no entry points",
            where=f"entry points {GROUP}",
            advice="Install dpkd again. In the clone: pip install -e .",
        )
    function: Callable[..., Any] = registered[name].load()
    return function
