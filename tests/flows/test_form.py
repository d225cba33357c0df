"""What a form offers, what it refuses, and how it is spelled."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from flows import form
from flows.nightly_rerun import tonight
from srlm_core import recipes, settings, store
from srlm_core.config import RunConfig
from srlm_core.errors import ConfigError


def walk(schema: Any) -> list[dict[str, Any]]:
    inner = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    return [*([schema] if isinstance(schema, dict) else []), *(found for one in inner for found in walk(one))]


@pytest.mark.parametrize(
    "name", ["self_reward.self_reward", "nightly_rerun.nightly_rerun", "measure.measure", "compare.compare"]
)
def test_the_page_can_draw_every_field(name: str) -> None:
    """No unions, no nulls, no field without a type or a word of explanation."""
    from prefect.flows import load_flow_from_entrypoint
    from prefect.utilities.callables import parameter_schema

    schema = parameter_schema(load_flow_from_entrypoint(f"flows.{name}").fn).model_dump()
    nodes = walk(schema)
    assert not any(union in node for node in nodes for union in ("anyOf", "oneOf", "allOf"))
    assert not any('"null"' in text or ": null" in text for text in [json.dumps(schema)])
    fields = [
        *schema["properties"].values(),
        *(p for d in schema["definitions"].values() for p in d["properties"].values()),
    ]
    assert all("type" in field or "$ref" in field for field in fields)
    assert not [field["title"] for field in fields if not field.get("description")]


def test_each_field_has_the_bounds_of_its_setting() -> None:
    fields = form.Changed.model_json_schema()["properties"]
    assert set(fields) == {name.replace(".", "_") for name in form.OFFERED}
    assert fields["responses_n"] | {"description": ""} == {
        "type": "integer", "minimum": 1, "title": "responses.n", "description": "",
        "position": form.OFFERED.index("responses.n"),
    }  # fmt: skip
    assert fields["judgments_reading"]["enum"] == ["text", "guided", "expected"]
    assert set(form.OFFERED) <= set(settings.flat(RunConfig()))


def test_what_a_form_changes_is_what_the_recipe_is_loaded_with() -> None:
    changed = form.Changed.model_validate({"responses_n": 8, "judgments_reading": "guided", "training_dpo_beta": 1e-3})
    more = [
        form.Override(setting="evaluation.head_to_head", value='["chain"]'),
        form.Override(setting="prompts.file", value="null"),
    ]
    config = recipes.load("smoke", None, form.spelled(changed, more))
    assert (config.responses.n, config.judgments.reading, config.training.dpo.beta) == (8, "guided", 1e-3)
    assert (config.evaluation.head_to_head, config.prompts.file) == (("chain",), None)
    assert form.spelled(form.NOTHING) == []
    assert form.NOTHING.model_dump() == {}


def test_what_is_shown_of_a_run_asks_for_the_same_again() -> None:
    changed = {
        "prompts.target": 8,
        "engine.compiled": None,
        "evaluation.head_to_head": ["chain"],
        "prompts.file": "a b",
    }
    asked = [form.Override.model_validate(one) for one in form.as_asked(changed)]
    merged = recipes.merge(*(recipes.parse_override(text) for text in form.spelled(form.NOTHING, asked)))
    assert settings.flatten(merged) == changed


@pytest.mark.parametrize("text", ["/etc/passwd", "../../secrets.txt", "~/.ssh/id_rsa", "a/../../../etc"])
def test_a_path_outside_the_root_is_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRLM_ROOT", str(tmp_path / "runs"))
    for ask in (
        lambda: form.spelled(form.Changed.model_validate({"prompts_file": text})),
        lambda: form.spelled(form.NOTHING, [form.Override(setting="evaluation.more_judges", value=json.dumps([text]))]),
        lambda: form.path_below(text),
    ):
        with pytest.raises(ConfigError, match="expected a path below"):
            ask()


def test_a_path_below_the_root_or_a_named_folder_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRLM_ROOT", str(tmp_path / "runs"))
    monkeypatch.setenv("SRLM_PATHS", f"{tmp_path / 'models'}:{tmp_path / 'data'}")
    model = tmp_path / "runs" / "demo" / "models" / "M2"
    model.mkdir(parents=True)
    assert form.path_below("demo/models/M2") == str(model)
    for text in (str(model), str(tmp_path / "data" / "p.txt"), "meta-llama/Llama-3-8B", "base", "m@http://host/v1"):
        assert form.path_below(text) == text


def test_a_team_has_recipes_of_its_own_and_one_that_is_gone_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SRLM_ROOT", str(tmp_path))
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "ours.toml").write_text('extends = "cream"\nseed = 6\n')
    assert recipes.load(form.recipe_file("ours"), "smoke").seed == 6
    (tmp_path / "recipes" / "ours.toml").unlink()
    with pytest.raises(ConfigError, match=r"got 'ours'.*put ours.toml into"):
        form.recipe_file("ours")


# --- every night ----------------------------------------------------------------------------------------------------


DUE = datetime(2026, 11, 23, 2, 0, tzinfo=UTC)


def test_each_night_has_a_campaign_and_a_seed_of_its_own(tmp_path: Path) -> None:
    name, config = tonight(recipes.load("smoke"), "smoke", DUE, tmp_path, extend=False)
    assert (name, config.seed) == ("smoke-2026-11-23", 20261123)


def test_the_newest_finished_campaign_grows_by_an_iteration_and_one_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    first = tonight(recipes.load("smoke"), "smoke", DUE, tmp_path, extend=True)
    assert first[0] == "smoke-2026-11-23"  # none is there yet
    for date in ("2026-11-20", "2026-11-21"):
        store.write_json(tmp_path / f"smoke-{date}" / "config.json", first[1].model_dump(mode="json"))
    store.write_json(tmp_path / "smoke-other" / "config.json", {})
    name, config = tonight(recipes.load("smoke"), "smoke", DUE, tmp_path, extend=True)
    assert (name, config.iterations, config.seed) == ("smoke-2026-11-21", 2, 20261123)
    store.write_json(tmp_path / name / "models" / "M3" / "complete.json", {})
    assert tonight(recipes.load("smoke"), "smoke", DUE, tmp_path, extend=True)[1].iterations == 3
