"""The form's conditions say of every recipe what the run would say: no more, no less."""

from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from flows import clashes, form
from srlm_core import methods, recipes
from srlm_core.errors import ConfigError

FIELDS = form.Changed.model_json_schema()["properties"]


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    from prefect.flows import load_flow_from_entrypoint
    from prefect.utilities.callables import parameter_schema

    flow = load_flow_from_entrypoint("flows.self_reward.self_reward")
    return clashes.with_conditions(parameter_schema(flow.fn).model_dump_for_openapi(), clashes.found())


def said(schema: dict[str, Any], **parameters: Any) -> list[tuple[str, str]]:
    """What Prefect's server would say of a form: fields and words."""
    from prefect.utilities.schema_tools.validation import validate

    return [(".".join(map(str, error.path)), error.message) for error in validate(parameters, schema)]


def values(field: dict[str, Any]) -> st.SearchStrategy[Any]:
    if "enum" in field:
        return st.sampled_from(field["enum"])
    if field["type"] == "integer":
        least = field.get("minimum", field.get("exclusiveMinimum", -1) + 1)
        most = field.get("maximum", 10_000)
        return st.sampled_from([n for n in (least, 1, 2, 3, 96, 97, 1023, 1024, 4095, most) if least <= n <= most])
    above, below = field.get("exclusiveMinimum", -1), field.get("exclusiveMaximum", 1e9)
    least, most = field.get("minimum", -1), field.get("maximum", 1e9)
    tried = [0, 1e-6, 0.1, 0.4, 1, 10]
    return st.sampled_from([x for x in tried if above < x < below and least <= x <= most])


CHANGED = st.lists(
    st.sampled_from([name for name, field in FIELDS.items() if "enum" in field or field["type"] != "string"]).flatmap(
        lambda name: st.tuples(st.just(name), values(FIELDS[name]))
    ),
    max_size=3,
).map(dict)


@given(
    recipe=st.sampled_from(form.offered_recipes()), size=st.sampled_from(get_args(form.Size)), changed=CHANGED,
)  # fmt: skip
def test_a_form_is_refused_where_the_run_would_refuse_it_and_nowhere_else(
    schema: dict[str, Any], recipe: str, size: str, changed: dict[str, Any]
) -> None:
    if {"responses_sampling_max_tokens", "engine_context"} <= changed.keys():
        del changed["engine_context"]  # numbers of the form that only the run compares
    assert bool(said(schema, recipe=recipe, size=size, settings=changed)) == refused_by_the_run(recipe, size, changed)


def refused_by_the_run(recipe: str, size: str, changed: dict[str, Any]) -> bool:
    try:
        spelled = form.spelled(TypeAdapter(form.Changed).validate_python(changed))
        methods.require_fit(recipes.load(form.recipe_file(recipe), size or None, spelled))
    except ConfigError:
        return True
    return False


@pytest.mark.parametrize(
    ("parameters", "field", "words"),
    [
        ({"recipe": "cream", "settings": {"responses_n": 1}}, "settings.responses_n", "less than the minimum of 2"),
        ({"settings": {"responses_n": 1}}, "settings.responses_n", "less than the minimum of 2"),  # the default recipe
        ({"recipe": "dpo", "settings": {"iterations": 2}}, "settings.iterations", "greater than the maximum of 1"),
        ({"recipe": "dno", "settings": {"pairs_min_margin": 0.5}}, "settings.pairs_min_margin", "0 was expected"),
        ({"recipe": "demo", "settings": {"judgments_k": 3}}, "settings.judgments_k", "1 was expected"),
        (
            {"recipe": "cream", "size": "small", "settings": {"responses_sampling_max_tokens": 1024}},
            "settings.responses_sampling_max_tokens", "greater than the maximum of 1023",
        ),
        ({"recipe": "smollm2_oasst", "size": "paper"}, "size", "is not one of ['', 'small']"),
        ({"settings": {"engine_kind": "openai"}}, "settings.engine_kind", "is not one of"),
    ],
)  # fmt: skip
def test_the_field_and_what_it_may_hold_are_named(
    schema: dict[str, Any], parameters: dict[str, Any], field: str, words: str
) -> None:
    ((found, message),) = said(schema, **parameters)
    assert found == field
    assert words in message


def test_what_overrides_or_another_field_may_mend_is_left_to_the_run(schema: dict[str, Any]) -> None:
    justified = [{"setting": "judgments.justified", "value": "true"}, {"setting": "judgments.reading", "value": "text"}]
    assert not said(schema, recipe="demo", settings={"judgments_k": 3}, overrides=justified)
    assert not said(schema, recipe="demo", settings={"responses_sampling_max_tokens": 2000, "engine_context": 4096})
    assert not said(schema, settings={"prompts_file": "prompts.txt", "prompts_file_share": 0.5})


def test_bounds_are_found_to_the_last_value() -> None:
    whole = {"type": "integer", "minimum": 1}
    assert clashes.allows(whole, lambda n: 3 <= n <= 700, 5) == {"minimum": 3, "maximum": 700}
    assert clashes.allows(whole, lambda n: n == 1, 1) == {"const": 1}
    assert clashes.allows(whole, lambda n: True, None) is None
    assert clashes.allows(whole, lambda n: False, None) == {"type": "null"}
    share = {"type": "number", "minimum": 0, "exclusiveMaximum": 0.5}
    assert clashes.allows(share, lambda x: x == 0, 0.0) == {"const": 0.0}
    found = clashes.allows(share, lambda x: x <= 0.25, 0.1)
    assert found is not None
    assert found["maximum"] == pytest.approx(0.25, abs=1e-6)
    assert found["maximum"] <= 0.25
    assert clashes.allows({"enum": ["a", "b"]}, lambda x: x == "a", "a") == {"enum": ["a"]}


def test_a_recipe_of_the_teams_own_that_does_not_work_by_itself_is_left_to_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "broken.toml").write_text("method = ")
    (tmp_path / "recipes" / "twice.toml").write_text('method = "dpo"\niterations = 2\n')  # with iterations=1 it works
    (tmp_path / "recipes" / "mine.toml").write_text('extends = "dpo"\n')
    monkeypatch.setenv("SRLM_ROOT", str(tmp_path))
    of_recipes = {recipe for where in clashes.found().values() for recipe in where}
    assert "mine" in of_recipes
    assert not of_recipes & {"broken", "twice"}
