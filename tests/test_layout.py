"""How a cluster's GPUs are divided, worked by hand."""

import pytest

from srlm_core.config import RunConfig
from srlm_core.errors import ConfigError
from srlm_core.layout import Layout, lay, lines
from srlm_core.plan import of_layout, plan


def config(tensor_parallel: int = 1, batch: int = 16, **engine: object) -> RunConfig:
    return RunConfig.model_validate({
        "engine": {"tensor_parallel": tensor_parallel, **engine},
        "responses": {"n": 4},
        "training": {"sft": {"batch_size": batch}, "dpo": {"batch_size": batch}},
    })  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "gpus", "per_node", "laid"),
    [
        (config(8), 64, 8, Layout(8, 8, 16)),
        (config(), 64, 8, Layout(8, 64, 16)),
        (config(4), 20, 8, Layout(3, 5, 16)),  # 2 + 2 + 1 in the half-empty node
        (config(3), 16, 8, Layout(2, 4, 16)),  # two of a node's eight are idle
        (config(batch=24), 64, 8, Layout(8, 64, 24)),
        (config(batch=24), 16, 8, Layout(2, 16, 12)),  # 16 ranks cannot share 24 rows evenly
        (config(), 1, 8, Layout(1, 1, 1)),
    ],
)
def test_replicas_stay_on_a_node_and_ranks_share_a_step_evenly(asked, gpus, per_node, laid):
    assert lay(asked, gpus, per_node) == laid


def test_a_replica_that_no_node_holds_is_refused():
    with pytest.raises(ConfigError, match=r"engine\.tensor_parallel: expected at most 8.*got 16"):
        lay(config(16), 64, 8)
    with pytest.raises(ConfigError, match="at most 4"):
        lay(config(8), 4, 8)


def test_the_layout_of_a_70b_campaign_by_hand():
    asked = config(8, shard_rows=256, shards_in_flight=2, max_sequences=512)
    spelled = {line.what: line for line in lines(asked, lay(asked, 64, 8), 64, 70 * 10**9, 140 * 10**9, [10_000, 500])}
    assert {what: round(line.value, 2) for what, line in spelled.items()} == {
        "nodes": 8, "replicas": 8, "weights on a GPU": 16.3, "shards": 40, "responses in flight": 2048,
        "training ranks": 16, "training on a GPU": 65.19,
    }  # fmt: skip
    assert spelled["replicas"].arithmetic.endswith("engine.placement=ray, engine.replicas=8")
    assert "5 a replica" in spelled["shards"].arithmetic
    assert "engine.shards_in_flight=4 would, 4096 places" in spelled["responses in flight"].arithmetic  # 4 x 1024
    assert "48 GPU(s) idle: training.launcher=ray, training.ranks=16" in spelled["training ranks"].arithmetic


def test_measured_rates_take_the_place_of_stated_ones():
    """64 GPUs at 1,000 tokens a second each, 16 that learn 500 each: hours are tokens by that."""
    laid, parameters = Layout(8, 8, 16), 10**9
    asked = config(8)
    rows = {"ift": 10, "eft": 20, "evaluation": 0, "heldout": 0}
    told = {}
    for rates in ((1000.0, 500.0), (None, None)):
        machine = of_layout(laid, 8, parameters, *rates)
        told[rates] = {line.what: line.value for line in plan(asked, parameters, 1, machine, rows, [100])}
    measured, stated = told.values()
    inference = measured["tokens generated"] + measured["tokens read"] + measured["tokens of evaluation"]
    assert measured["hours of sampling"] == pytest.approx(inference / 64_000 / 3600)
    assert stated["hours of sampling"] == pytest.approx(inference * 2e9 / (64 * 60e12) / 3600)
    nothing = plan(asked, parameters, 1, of_layout(laid, 8, parameters, 1.0, 500.0), rows, [])
    sft = next(line.value for line in nothing if line.what == "tokens trained on")
    assert next(line.value for line in nothing if line.what == "hours of training") == pytest.approx(sft / 8_000 / 3600)
