"""Processes that are forked from one that has imported the libraries, and end with the process that started them.

torch and transformers take seconds to import, which twenty finished steps would spend twenty times. The forkserver runs
nothing, holds no model and asks for no device.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import threading

#: modules that most steps need
PRELOAD = ["dpkd.distill.training", "dpkd.evaluate.evaluation", "dpkd.teacher_cache.build.cache"]
_ENDING = {signal.SIGTERM, signal.SIGHUP}


def forking_context() -> multiprocessing.context.ForkServerContext:
    """What starts processes from one that has imported the libraries. They must call `obey_parent`.

    The forkserver is deaf to SIGTERM and SIGHUP, which a cluster sends to every process of a job: it says how a process
    ended, so it must outlive one that is still writing its checkpoint. It ends by itself when nobody is left to fork
    for. The signals are blocked, not ignored, so that one that comes too early for a new process waits for it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    multiprocessing.resource_tracker.ensure_running()  # the forkserver's start would start it, which unblocks SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def obey_parent() -> None:
    """In a process of `forking_context`: receive SIGTERM and SIGHUP, and get SIGTERM when its parent is killed."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    threading.Thread(target=_end_with_parent, name="watch-parent", daemon=True).start()


def _end_with_parent() -> None:
    # PR_SET_PDEATHSIG would watch the forkserver, which lives for as long as this process
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
