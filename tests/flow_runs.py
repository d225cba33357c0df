"""Flow runs as the server of a test has them."""

from typing import Any


def client() -> Any:
    from prefect import get_client

    return get_client(sync_client=True)


def flow_run(name: str) -> Any:
    """The one flow run of this name."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName

    with client() as here:
        (found,) = here.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[name])))
    return found


def turns(run: Any) -> list[Any]:
    """The sub-flow runs of a campaign."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId

    wanted = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[run.id]))
    with client() as here:
        return here.read_flow_runs(flow_run_filter=wanted)
