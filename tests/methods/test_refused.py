"""What a method cannot work with is refused before anything is loaded."""

from pathlib import Path

import pytest

from flows.looking import planned
from srlm_core import recipes
from srlm_core.backend import resolve
from srlm_core.errors import ConfigError


@pytest.mark.parametrize(
    ("recipe", "setting", "said"),
    [
        ("dpo", "iterations=2", r"method=dpo trains once .* got iterations=2\. Set iterations=1"),
        ("spin", "responses.n=4", r"method=spin .* got responses\.n=4\. Set responses\.n=1"),
        ("self_rewarding", "responses.n=1", r"method=self_rewarding .* got responses\.n=1"),
        ("self_rewarding", "method=self_reward", r"got 'self_reward'\. Did you mean self_rewarding\?"),
    ],
)
def test_by_a_run_and_by_a_plan(recipe, setting, said):
    config = recipes.load(recipe, "smoke", [setting])
    with pytest.raises(ConfigError, match=said):
        resolve(config)
    with pytest.raises(ConfigError, match=said):
        planned(config, Path("nowhere"), gpus=0)


def test_recipes_that_extend_one_another_in_a_circle(tmp_path):
    first, second = tmp_path / "first.toml", tmp_path / "second.toml"
    first.write_text(f'extends = "{second}"\n')
    second.write_text(f'extends = "{first}"\n')
    with pytest.raises(ConfigError, match=r"got a circle: .*first.toml > .*second.toml > .*first.toml"):
        recipes.load(str(first))
