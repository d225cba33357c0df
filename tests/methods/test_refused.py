"""What a method cannot work with is refused before anything is loaded."""

from pathlib import Path

import pytest

from flows.looking import Cluster, planned
from srlm_core import recipes
from srlm_core.backend import resolve
from srlm_core.errors import ConfigError


@pytest.mark.parametrize(
    ("recipe", "setting", "said"),
    [
        ("dpo", "iterations=2", r"method=dpo trains once .* got iterations=2\. Set iterations=1"),
        ("spin", "responses.n=4", r"method=spin .* got responses\.n=4\. Set responses\.n=1"),
        ("self_rewarding", "responses.n=1", r"method=self_rewarding .* got responses\.n=1"),
        ("meta_rewarding", "judgments.k=1", r"compares the judgments of one response, got judgments\.k=1"),
        ("meta_rewarding", "judgments.reading=expected", r"got judgments\.reading=expected.*meta\.trains_judge=false"),
        ("scir", "responses.n=1", r"method=scir .* got responses\.n=1"),
        (
            "scir",
            "training.dpo.loss=sigmoid",
            r"method=scir leaves open .*loss=sigmoid has to be told\. Set",
        ),
        ("cream", "training.dpo.loss=scir", r"method=cream says which .*loss=scir finds that out.*loss=sigmoid"),
        ("scir", 'schedule=[{iteration=2, set={"training.dpo.loss"="sppo"}}]', r"from iteration 2 on: .*loss=sppo"),
        ("self_rewarding", 'schedule=[{iteration=2, set={"responses.n"=1}}]', r"from iteration 2 on: .*responses\.n=1"),
        ("self_rewarding", "training.dpo.loss=sppo", r"loss=sppo reads .* win rates, and method=self_rewarding pairs"),
        ("dno", "training.dpo.loss=sppo", r"loss=sppo reads .*method=dno pairs by others.*dno\.judge_by=win_rate"),
        (
            "dno",
            'schedule=[{iteration=2, set={"training.dpo.loss"="sppo"}}]',
            r"schedule, from iteration 2 on: .*loss=sppo reads",
        ),
        ("sppo", "responses.n=1", r"method=sppo .* got responses\.n=1"),
        ("self_rewarding", "method=self_reward", r"got 'self_reward'\. Did you mean self_rewarding or "),
    ],
)
def test_by_a_run_and_by_a_plan(recipe, setting, said):
    config = recipes.load(recipe, "smoke", [setting])
    with pytest.raises(ConfigError, match=said):
        resolve(config)
    with pytest.raises(ConfigError, match=said):
        planned(config, Path("nowhere"), Cluster())


def test_recipes_that_extend_one_another_in_a_circle(tmp_path):
    first, second = tmp_path / "first.toml", tmp_path / "second.toml"
    first.write_text(f'extends = "{second}"\n')
    second.write_text(f'extends = "{first}"\n')
    with pytest.raises(ConfigError, match=r"got a circle: .*first.toml > .*second.toml > .*first.toml"):
        recipes.load(str(first))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ('{iteration=2, set={"pairs.rho"=0.3}}', r"unknown setting 'pairs.rho'"),
        (
            '{iteration=2, set={"prompts.target"=5}}',
            r"got 'prompts.target' for iteration 2: it is the same for a whole",
        ),
        (
            '{iteration=2, set={"pairs.length_control"=0.7}}',
            r"pairs.length_control: expected .*less than 0.5",
        ),
        ('{iteration=1, set={"pairs.length_control"=0.1}}', r"schedule.0.iteration: expected"),
    ],
)
def test_a_schedule_that_cannot_be(change, said):
    with pytest.raises(ConfigError, match=said):
        recipes.load("self_rewarding", "smoke", [f"schedule=[{change}]"])


def test_sizes_that_are_like_one_another_in_a_circle(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[sizes.one]\nlike = "two"\n[sizes.two]\nlike = "one"\n')
    with pytest.raises(ConfigError, match=r"got a circle: one > two > one"):
        recipes.load(str(path), "one")


@pytest.mark.parametrize("name", ["nll", "heldout_share"])
def test_what_has_to_know_the_better_response_where_nobody_said(name):
    with pytest.raises(ConfigError, match=rf"training\.dpo\.loss=scir .* training\.dpo\.{name}=0\.2 has to know\. Set"):
        recipes.load("scir", "smoke", [f"training.dpo.{name}=0.2"])
