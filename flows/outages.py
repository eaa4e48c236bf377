"""Keep drivers running while Prefect's server is away: Prefect itself would end them.

Both functions replace a function in modules of Prefect; where it is missing, they change nothing.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import httpx

log = logging.getLogger(__name__)


@cache
def continue_without_slot() -> None:
    """Let flow runs of this process continue without their slot of the deployment's concurrency limit.

    Prefect ends a flow run whose slot cannot be renewed: the server was restarted and has forgotten it, or was away at the
    time. The lock of the run folder still refuses a second driver.
    """
    from prefect import flow_engine

    maintain = getattr(flow_engine, "maintain_concurrency_lease", None)
    if maintain is None:
        return

    def maintain_while_possible(*arguments: Any, **options: Any) -> Any:
        return maintain(*arguments, **options | {"raise_on_lease_renewal_failure": False})

    flow_engine.maintain_concurrency_lease = maintain_while_possible  # type: ignore[attr-defined]


@cache
def poll_without_limit() -> None:
    """Let Prefect's runner wait for its server: after three failed polls it would end, and kill its flow runs.

    Likewise its observer, without which flow runs could not be cancelled any more.
    """
    for name in ("runner._scheduled_run_poller", "_internal._observation_delivery", "_internal.observers"):
        if find_spec(f"prefect.{name}") is None:  # of another version of Prefect
            continue
        module = import_module(f"prefect.{name}")
        if hasattr(module, "critical_service_loop"):
            module.critical_service_loop = partial(_poll, name.startswith("runner"))  # type: ignore[attr-defined]


async def _poll(warns: bool, workload: Callable[[], Awaitable[Any]], interval: float, **_: Any) -> None:
    """Call `workload` at intervals, also while the server does not answer."""
    level = logging.WARNING if warns else logging.DEBUG
    away = False
    while True:
        try:
            await workload()
            if away:
                log.log(level, "the Prefect server answers again")
            away = False
        except (httpx.HTTPError, ValueError) as error:  # ValueError: what answers is not Prefect
            if not away:
                log.log(level, "the Prefect server does not answer (%r); waiting for it, flow runs continue", error)
            away = True
        await asyncio.sleep(interval)
