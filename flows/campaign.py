"""Puts a campaign together: the loop, who runs its work, who watches. Imports neither Prefect nor MLflow."""

import importlib.util
import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

from flows.server import PrefectServer
from srlm_core import loop
from srlm_core.backend import Backend
from srlm_core.config import RunConfig
from srlm_core.errors import SrlmError
from srlm_core.executor import PlainExecutor
from srlm_core.mirror import Mirror
from srlm_core.run import Observer, Run
from srlm_core.store import Campaign
from tasks.tracking import Tracking

log = logging.getLogger("srlm")


def run_campaign(
    config: RunConfig,
    campaign: Campaign,
    *,
    backend: Backend,
    observers: Sequence[Observer] = (),
    use_prefect: bool = True,
    use_mlflow: bool = True,
    mirror: Mirror | None = None,
) -> None:
    """Run a campaign to its end, shown by Prefect and recorded by MLflow where they are wanted and there.

    Neither is needed: what cannot be had is told in one line, and the files come out the same.
    """
    with ExitStack() as stack:
        # both take seconds to come up: begun first, waited for last
        server = stack.enter_context(PrefectServer(campaign.root)) if use_prefect and _there("prefect") else None
        tracking = stack.enter_context(Tracking(config, campaign)) if use_mlflow and _there("mlflow") else None
        # the report first: the others link to it and keep it
        watching = [partial(_report, campaign), *observers, *(each for each in (tracking, mirror) if each)]
        plain = stack.enter_context(PlainExecutor(workers(config)))
        run = Run(config, campaign, plain, backend, watching, mirror)
        if server is None or not _shown(run, server, tracking):
            loop.self_reward(run)


def workers(config: RunConfig) -> int:
    """Threads for the shards in flight, each with its three dependent stages, and an evaluation beside them.

    The scripted engine computes in this process: nobody waits for it, and more threads only hold more rows.
    """
    if config.engine.kind == "scripted":
        return 2
    return 3 * config.engine.shards_in_flight + 5


def _shown(run: Run, server: PrefectServer, tracking: Tracking | None) -> bool:
    """Run the campaign as a flow; False where Prefect cannot show it."""
    # while the server starts: what the flow needs first. An error is raised again where the flow can show it
    with suppress(SrlmError):
        _ = run.seed_data, run.base
    try:
        from flows import self_reward
    except ImportError as error:
        log.warning("Prefect cannot be imported, so the campaign runs without it: %s", error)
        return False
    if not server.ready():
        told = "No Prefect server answers at %s, so the campaign runs without it. %s"
        log.warning(told, server.url, server.last_words())
        return False
    with server.settings():
        self_reward.show(run, tracking)
    return True


def _report(campaign: Campaign, what: str, details: dict[str, Any]) -> None:
    if what in ("finished", "stopped", "waiting"):
        from srlm_core.report import write_report

        try:
            write_report(campaign.folder)
        except Exception as error:  # the seam: days of work are done, and `srlm report` writes it again
            log.warning("The report could not be written: %s. All else is there: srlm report %s", error, campaign.name)


def _there(package: str) -> bool:
    if sys.modules.get(package) or (package not in sys.modules and importlib.util.find_spec(package)):
        return True
    log.warning("%s is not installed, so the campaign runs without it: pip install srlm[%s]", package, package)
    return False
