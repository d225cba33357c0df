import pytest

from srlm_core import recipes, settings
from srlm_core.config import RunConfig
from srlm_core.errors import ConfigError

LEAVES = sorted(settings.flat(RunConfig()))


@pytest.mark.parametrize("name", LEAVES)
def test_every_setting_is_in_one_class(name):
    classes = [stage for stage, prefixes in settings.STAGES.items() if any(settings.covers(p, name) for p in prefixes)]
    if any(settings.covers(p, name) for p in settings.NEUTRAL):
        # a neutral leaf inside a stage's subtree is taken out of that stage
        assert settings.stage_of(name) is None
    else:
        assert len(classes) == 1, f"{name} belongs to {classes}"


def test_neutral_settings_are_in_no_fingerprint():
    picked = settings.pick(RunConfig(), ("training.sft",))
    assert "training.sft.learning_rate" in picked
    assert "training.sft.micro_batch_size" not in picked


def test_a_method_step_reads_only_settings_of_its_own_and_later_stages():
    from srlm_core.methods import METHODS

    for method in METHODS.values():
        for step in method.steps:
            for prefix in step.settings:
                assert any(settings.covers(prefix, name) for name in LEAVES), f"{method.name}.{step.makes}: {prefix}"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("responses.n", 4), ("responses.sampling.temperature", 0.7), ("responses.sampling.top_p", 0.9),
        ("judgments.k", 3), ("judgments.reading", "text"),
        ("prompts.sampling.temperature", 0.6), ("prompts.sampling.top_p", 0.9),
        ("prompts.seed_demonstrations", 6), ("prompts.generated_demonstrations", 2), ("prompts.max_similarity", 0.7),
        ("training.sft.learning_rate", 5.5e-6), ("training.sft.final_learning_rate", 1.1e-6),
        ("training.sft.batch_size", 16),
        ("training.dpo.learning_rate", 1e-6), ("training.dpo.final_learning_rate", 1e-7),
        ("training.dpo.batch_size", 16), ("training.dpo.beta", 0.1), ("training.dpo.loss", "sigmoid"),
        ("training.dpo.nll", 0),
        ("training.dpo.checkpoint_steps", 200), ("iterations", 2),
    ],
)  # fmt: skip
def test_the_defaults_are_the_papers(field, value):
    assert settings.flat(RunConfig())[field] == value


@pytest.mark.parametrize("name", [*recipes.names(), *recipes.SHORTCUTS])
def test_every_recipe_resolves_at_every_size(name):
    sizes = [None] if name in recipes.SHORTCUTS else list(recipes.read(name).sizes)
    for size in sizes:
        assert recipes.load(name, size).method


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("responses.m=8", "responses.n"),
        ("responses.n=0", "responses.n"),
        ("responses.n=many", "responses.n"),
        ("judgments.justified=false", "expected"),
        ("prompts.file_share=0.5", "prompts.file"),
        ("judgments.min_valid=9", "judgments.k"),
        ("responses.sampling.max_tokens=99999", "engine.context"),
        ("nonsense", "key=value"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_field(override, told):
    with pytest.raises(ConfigError, match=told):
        recipes.load("smoke", overrides=[override])


def test_passes_without_justification_need_k_1():
    with pytest.raises(ConfigError, match=r"judgments\.k=1"):
        recipes.load("smoke", overrides=["judgments.reading=expected", "judgments.justified=false", "judgments.k=3"])


def test_only_a_benchmark_that_draws_answers_needs_room_for_them():
    assert recipes.load("demo", overrides=["evaluation.suites.capability=['arc_easy']"]).engine.context == 1024
    with pytest.raises(ConfigError, match=r"evaluation.suites.sampling.max_tokens=1024 leaves no room"):
        recipes.load("demo", overrides=["evaluation.suites.ifeval=questions.jsonl"])


def test_a_recipe_that_does_not_exist_names_the_near_ones():
    with pytest.raises(ConfigError, match="self_rewarding"):
        recipes.load("self_rewording")


def test_a_size_that_does_not_exist_names_the_sizes():
    with pytest.raises(ConfigError, match="smoke"):
        recipes.load("self_rewarding", "tiny")


def test_overrides_are_typed():
    config = recipes.load("smoke", overrides=["responses.n=8", "judgments.judge=/some/path", "prompts.generator=base"])
    assert (config.responses.n, config.judgments.judge, config.prompts.generator) == (8, "/some/path", "base")


def test_the_schema_for_editors_is_the_one_that_ships_and_every_recipe_fits_it():
    import json
    import tomllib

    import jsonschema

    from srlm_core.config import schema

    shipped = json.loads((recipes.FOLDER / "recipe.schema.json").read_text())
    assert shipped == schema(), "run: srlm recipes --settings > srlm_core/recipes/recipe.schema.json"
    for name in recipes.names():
        jsonschema.validate(tomllib.loads((recipes.FOLDER / f"{name}.toml").read_text()), shipped)
