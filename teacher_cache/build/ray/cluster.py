"""The Ray cluster of a job: the one at RAY_ADDRESS, or a new one on this machine."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from typing import TYPE_CHECKING, Any

from dpkd.core.errors import UserError
from dpkd.core.progress import say

if TYPE_CHECKING:
    from dpkd.teacher_cache.options.cache import CacheConfig

_CONNECT_TIMEOUT_S = 10.0
_LOCAL = "local"


def connect() -> None:
    """Connect to the cluster at RAY_ADDRESS, or start one on this machine."""
    import ray

    # hide Ray's own messages; errors are raised
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    address = os.environ.get("RAY_ADDRESS", _LOCAL)
    try:
        if address == _LOCAL:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            # a dead replica's own processes would keep its GPU (Ray's default from 2.57 on)
            os.environ.setdefault("RAY_process_group_cleanup_enabled", "true")
            ray.init(_LOCAL, include_dashboard=False, **quiet)
        else:
            _check_address(address)
            ray.init(address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"Ray cannot be started or reached: {last_line(error)}",
            where=f"RAY_ADDRESS={address}",
            advice="Check the address, the token (RAY_AUTH_MODE), and that Python and Ray are the cluster's versions",
        ) from error
    finally:
        # Ray sets its own handler, with which SIGTERM would not interrupt the job
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)


def _check_address(address: str) -> None:
    """Raise `OSError` if nothing listens at `address`: Ray would try for a quarter of an hour."""
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "://" not in address:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()


def last_line(error: Exception) -> str:
    """The last line of one of Ray's errors, which names the cause."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()[:300]


def check_resources(config: CacheConfig) -> None:
    """Raise `UserError` if this machine has too few CPUs or GPUs; a cluster may grow, so there the user is told."""
    import ray

    if config.device == "cuda" and not config.ray_gpus:
        raise UserError("--device cuda needs replicas with a GPU", found="ray_gpus 0", advice="Add --ray-gpus 1")
    reserved = {"CPU": config.ray_cpus, "GPU": config.ray_gpus}
    available = sum(
        min(
            (int(node["Resources"].get(name, 0) / amount + 1e-9) for name, amount in reserved.items() if amount),
            default=config.ray_replicas,
        )
        for node in ray.nodes()
        if node["Alive"]
    )
    if available >= config.ray_replicas:
        return
    found = f"resources for {available} replicas of {config.ray_cpus:g} CPUs and {config.ray_gpus:g} GPUs"
    if os.environ.get("RAY_ADDRESS", _LOCAL) == _LOCAL:
        raise UserError(
            "this machine has too few resources for the replicas",
            found=found,
            expected=f"for {config.ray_replicas}",
            advice="Lower --ray-replicas, --ray-cpus or --ray-gpus, or set RAY_ADDRESS",
        )
    say(f"the Ray cluster has {found}; the rest of the {config.ray_replicas} start when it grows")
