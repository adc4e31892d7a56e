"""Keeps the garbage collector from looking at the libraries: importing this module freezes what is imported by now.

Without this, every collection goes through a million objects, and vLLM asks for nine when an engine starts and ends.
vLLM's own calls do nothing afterwards: one engine's end would thaw everything, and the next one's start freeze itself.
"""

import atexit
import gc

_freeze, _thaw = gc.freeze, gc.unfreeze


def freeze_libraries() -> None:
    """Freeze what this process has imported since."""
    gc.collect()
    _freeze()


freeze_libraries()
gc.freeze = gc.unfreeze = lambda: None
atexit.register(_thaw)  # nanobind would call what is left at the end a leak
