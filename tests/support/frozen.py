"""The last module that the server of forked processes imports: what is there by now is no garbage.

Without this, every collection of a child goes through a million objects of the libraries, and vLLM asks for several.
"""

import atexit
import gc

gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)  # nanobind would call what is left at the end a leak
