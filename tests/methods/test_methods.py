"""What holds for every method: found by itself, alone, and in each of its sizes a configuration that it accepts."""

import ast
from pathlib import Path

import pytest

from srlm_core import methods, recipes
from srlm_core.methods import METHODS, require_fit
from srlm_core.methods.record import Step

FOLDER = Path(methods.__file__).parent


@pytest.mark.parametrize("name", METHODS)
def test_its_recipe_and_module_are_named_like_it_and_no_other_method_is_imported(name):
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    froms = {f"{node.module}.{alias.name}" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
             for alias in node.names}  # fmt: skip
    assert not froms & {f"srlm_core.methods.{other}" for other in METHODS}
    assert not any(module.startswith(f"srlm_core.methods.{other}.") for module in froms for other in METHODS)
    assert recipes.load(name, "smoke").method == name


@pytest.mark.parametrize("name", recipes.names())
def test_each_size_of_a_recipe_is_a_configuration_that_its_method_accepts(name):
    for size in recipes.read(name).sizes:
        require_fit(recipes.load(name, size))


@pytest.mark.parametrize("name", METHODS)
def test_it_comes_in_four_sizes_and_makes_prompts_and_what_is_learnt_from(name):
    assert {"smoke", "small", "node", "paper"} <= recipes.read(name).sizes.keys()
    made = [step.makes for step in METHODS[name].makes]
    assert made[0] == "prompts"
    assert made[-1] == {"dpo": "pairs", "online": "prompts"}[METHODS[name].learns]
    before: set[str] = set()
    for step in METHODS[name].steps:
        assert set(step.reads) <= before
        before |= {step.makes} if isinstance(step, Step) else set()
