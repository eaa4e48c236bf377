"""A driver watches the state of its flow run on Prefect's server, which people and the server's automations may change."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import Abort
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelled, Running

_log = logging.getLogger(__name__)

NO_HEARTBEATS = "no heartbeats; retry the run: it finds jobs that are still running"
"""Message of the state that the automation of `flows.crash_detection` sets."""
_PAUSE = 30.0  # seconds between two looks at the state


@contextmanager
def watched_state() -> Iterator[None]:
    """Interrupt the block, as Ctrl-C does, when its flow run is cancelled and no runner ends this process.

    If the flow run was marked as crashed while the server got no heartbeats, it becomes Running again.
    """
    context = FlowRunContext.get()
    if context is None or context.flow_run is None or PREFECT_API_URL.value() is None:  # nobody reaches its own server
        yield
        return
    flow_run, ended, cancelled = context.flow_run.id, threading.Event(), threading.Event()
    watch = threading.Thread(
        target=copy_context().run, args=(_watch, flow_run, ended, cancelled), daemon=True, name="state of the flow run"
    )
    watch.start()
    try:
        yield
    except BaseException as error:
        if not cancelled.is_set():
            raise
        with suppress(Exception), get_client(sync_client=True) as client:  # the server does it, too, after five minutes
            client.set_flow_run_state(flow_run, Cancelled(message="The driver has ended."), force=True)
        raise Abort("cancelled in Prefect") from error  # any other exception would set another state
    finally:
        ended.set()


def _watch(flow_run: UUID, ended: threading.Event, cancelled: threading.Event) -> None:
    runner = os.getppid() if os.environ.get("PREFECT__FLOW_RUN_ID") == str(flow_run) else None
    while not ended.wait(_PAUSE):
        try:
            with get_client(sync_client=True) as client:
                state = client.read_flow_run(flow_run).state
                if state is not None and state.is_crashed() and state.message == NO_HEARTBEATS:
                    client.set_flow_run_state(flow_run, Running(message="The driver is alive."), force=True)
        except Exception as error:  # the server may be away for a while
            _log.debug("the state of the flow run cannot be read: %s", error)
            continue
        # A runner ends its process at once, and says that it is cancelled when that has ended.
        if state is not None and (state.is_cancelled() or (state.is_cancelling() and runner != os.getppid())):
            if not ended.is_set():
                _log.warning("the flow run was cancelled in Prefect")
                cancelled.set()
                os.kill(os.getpid(), signal.SIGINT)
            return
