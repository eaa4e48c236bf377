"""An automation of Prefect's server that marks flow runs as crashed when their heartbeats stop.

A killed process is reported by its parent; nobody reports a lost machine.
"""

from collections.abc import Iterator
from datetime import timedelta
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.events import Event, RelatedResource, Resource
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

from flows import evaluation, experiment, study, tailor
from flows.state_watch import NO_HEARTBEATS

_NAME = "montessori: montessori: mark flow runs without heartbeats as crashed"
_TIMEOUT = 300
"""Seconds without a heartbeat until a flow run counts as crashed. A driver sends one every 30 s, so that its server may be
away for four minutes. Flows of other programs may have the same names; they send one every 180 s by default."""
_HEARTBEAT = "prefect.flow-run.heartbeat"
_ENDS = ("Completed", "Failed", "Cancelled", "Crashed", "Paused", "Suspended")
_PAGE = 200  # flow runs in an answer of the server, events in a request
_WATCHED = (
    *(experiment.montessori, experiment.experiment, tailor.tailor),
    *(study.compare, study.compare_opened, evaluation.evaluate, evaluation.evaluate_opened),
)
FLOWS = sorted(flow.name for flow in _WATCHED)
"""Names of the flows whose drivers watch their state (`flows.state_watch`): Prefect's server tells flows apart by names."""


def register_crash_detection() -> None:
    """Register the automation, in place of one of an earlier version, and have it watch all flow runs that are running.

    The server forgets flow runs whose heartbeats stop while it is away, such as in a restart of the whole machine.
    """
    automation = _automation()
    with get_client(sync_client=True) as client:
        existing = client.read_automations_by_name(_NAME)
        if [old.description for old in existing] != [automation.description]:
            for old in existing:
                client.delete_automation(old.id)
            client.create_automation(automation)
        beats = list(_heartbeats(client))
        for start in range(0, len(beats), _PAGE):
            client.request(
                "POST", "/events", json=[beat.model_dump(mode="json") for beat in beats[start : start + _PAGE]]
            )


def _automation() -> AutomationCore:
    return AutomationCore(
        name=_NAME,
        description=f"A flow run of Montessori whose heartbeats stop for {_TIMEOUT} s has lost its process or its machine.",
        trigger=EventTrigger(
            after={_HEARTBEAT},
            expect={_HEARTBEAT, *(f"prefect.flow-run.{state}" for state in _ENDS)},
            match={"prefect.resource.id": ["prefect.flow-run.*"]},  # type: ignore[arg-type]
            match_related={"prefect.resource.role": "flow", "prefect.resource.name": FLOWS},  # type: ignore[arg-type]
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=_TIMEOUT),
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, name="Crashed", message=NO_HEARTBEATS)],
    )


def _heartbeats(client: SyncPrefectClient) -> Iterator[Event]:
    """Yield a heartbeat for each flow run that is running and has sent one: if others do not follow, its driver is lost."""
    running = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING])))
    for name in FLOWS:
        flow, offset = FlowFilter(name=FlowFilterName(any_=[name])), 0
        while page := client.read_flow_runs(flow_filter=flow, flow_run_filter=running, limit=_PAGE, offset=offset):
            offset += len(page)
            for flow_run in page:
                if not _has_sent_heartbeats(client, flow_run.id):  # it may be of another program
                    continue
                related = {
                    "prefect.resource.id": f"prefect.flow.{flow_run.flow_id}",
                    "prefect.resource.role": "flow",
                    "prefect.resource.name": name,
                }
                yield Event(
                    event=_HEARTBEAT,
                    resource=Resource.model_validate({"prefect.resource.id": f"prefect.flow-run.{flow_run.id}"}),
                    related=[RelatedResource.model_validate(related)],
                )


def _has_sent_heartbeats(client: SyncPrefectClient, flow_run: UUID) -> bool:
    events = {"event": {"name": [_HEARTBEAT]}, "resource": {"id": [f"prefect.flow-run.{flow_run}"]}}
    answer = client.request("POST", "/events/filter", json={"filter": events, "limit": 1})
    return bool(answer.json()["events"])
