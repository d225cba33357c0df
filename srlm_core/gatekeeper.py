"""gatekeeper: where a campaign may end on purpose: M_t fails a gate, or somebody decides so between two iterations."""

from functools import partial

from srlm_core import approval, frozen_judge, gates
from srlm_core.errors import Stopped, StoppedByGate, StoppedByPerson, WaitsForPerson
from srlm_core.rates import Rate
from srlm_core.run import MARKER, Run


def ask_gates(run: Run, t: int) -> None:
    """Hold M_t against the gates that are set, and write and tell it. Raises StoppedByGate where one failed.

    Everything is measured anew from the files, so that a limit that was changed holds.
    """
    model, folder = run.model(f"M{t}"), run.campaign.folder
    if not run.config.gates.asked:
        gates.forget(folder, t)
        return
    found = gates.measure(folder, t, run.config, _win_rate(run, t))
    gates.keep(folder, t, run.config, model.digest, found)
    run.tell("gate", t=t, gates=found)
    failed = [gate for gate in found if gate.passed is False]
    if failed and run.config.gates.stop:
        _stop(run, StoppedByGate(_what_failed(run, t, failed)))


def _win_rate(run: Run, t: int) -> Rate:
    """Let the frozen judge compare M_t with M_t-1: the same part that the last head-to-heads are made of."""
    if run.config.gates.min_win_rate is None or t == 1:
        return gates.UNKNOWN
    judge = run.role(run.config.evaluation.judge, run.base)
    with run.phase(f"M{t} against M{t - 1}"), run.engines() as lend:
        tally = frozen_judge.meet(run, judge, lend, f"M{t}", f"M{t - 1}")
    return gates.UNKNOWN if tally is None else Rate(**tally["win_or_half_tie"])


def _what_failed(run: Run, t: int, failed: list[gates.Gate]) -> str:
    spelled = "\n".join(f"  {gate} ({gate.setting})" for gate in failed)
    before = f" before M{t + 1} is trained" if t <= run.config.iterations else ""
    return (
        f"M{t} was expected to pass its gates{before}, but failed {len(failed)}:\n{spelled}\n"
        f"Everything made is kept in {run.campaign.folder}. Change the setting that is named (null = not checked), or "
        "set gates.stop=false, and the same command goes on; or change what the model learns from, with --redo."
    )


def ask_person(run: Run, t: int) -> None:
    """Wait after iteration t until somebody decides, where `gates.approval` asks for it.

    Raises StoppedByPerson where the decision is to stop, WaitsForPerson where nobody can be asked from here.
    """
    begun = (run.campaign.model(f"M{t + 2}") / MARKER).exists()
    if not run.config.gates.approval or t == run.config.iterations or begun:
        return
    folder, name = run.campaign.folder, run.campaign.name
    go_on = approval.read(folder, t)
    if go_on is None:
        asked = f"{name}: iteration {t} is finished, M{t + 1} is trained. Go on to iteration {t + 1}?"
        run.tell("waiting", question=asked)
        go_on = run.executor.ask(asked, partial(approval.read, folder, t))
        if go_on is not None and approval.read(folder, t) is None:
            approval.keep(folder, t, go_on=go_on)
    how = f"`srlm approve {name}`, and the same command goes on; `srlm approve {name} --stop` ends it here."
    if go_on is None:
        raise WaitsForPerson(f"{name} waits for a decision after iteration {t}, and nobody could be asked. {how}")
    if not go_on:
        _stop(run, StoppedByPerson(f"{name} ended after iteration {t}: somebody decided so. Otherwise: {how}"))


def _stop(run: Run, why: Stopped) -> None:
    run.tell("stopped", why=str(why))
    raise why
