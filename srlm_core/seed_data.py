"""seed_data: what a campaign starts from and what only measures it, read, kept apart, and chosen (section 3.1.1)."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from srlm_core import contamination, data, eft, suites
from srlm_core.config import RunConfig, SeedDataConfig
from srlm_core.errors import DataError
from srlm_core.store import digest


class SeedData(NamedTuple):
    """What the campaign starts from, and what only measures."""

    ift: list[dict[str, Any]]
    demonstrations: list[str]
    eft: list[dict[str, Any]]
    """Ranked groups that do not measure: laid out to teach judging or, where the method teaches none, as they came."""
    heldout: list[dict[str, Any]]
    evaluation: list[dict[str, Any]]
    attacks: list[dict[str, Any]]
    requests: list[dict[str, Any]]
    """Harmful ones, and harmless ones that sound like them."""
    own_prompts: list[str]
    suites: Mapping[str, suites.Taken]
    """The published benchmarks that the models take."""
    measuring: contamination.Watch
    """Knows the prompts that must never be trained on: also where this campaign measures by a part of them."""
    set_aside: dict[str, list[data.SetAside]]
    identities: dict[str, str]


def load_seed(config: RunConfig, *, teaches_judging: bool = True) -> SeedData:
    """Read the seed data; what cannot be used is set aside, a file without a good row raises DataError.

    `teaches_judging`: whether EFT's groups are to teach it, and so are chosen and scored for that.
    """
    seed, wanted = config.seed_data, config.evaluation
    loaded = _files(config)
    attacks, requests = data.attacks(), data.requests()
    sets = {
        "heldout": loaded["heldout"].rows, "evaluation": loaded["evaluation"].rows, "attacks": attacks,
        "requests": requests,
    }  # fmt: skip
    measuring = {name: [text for row in rows for text in data.asked(row)] for name, rows in sets.items()}
    taken = suites.load(wanted.suites)
    others = {name: one.everything for name, one in taken.items()}
    for name in seed.keep_out:
        others[name] = [text for row in data.load(name, "prompts").rows for text in data.asked(row)]
    measuring |= others
    watch = contamination.Watch(measuring)
    loaded |= _without_copies(loaded, watch)
    own = [row["prompt"].strip() for row in loaded["prompts"].rows] if config.prompts.file else []
    ift = data.spread(data.of_kinds(loaded["ift"].rows, seed.ift_kinds, "seed_data.ift_kinds"), seed.ift_rows)
    shown = data.of_kinds(ift, config.prompts.demonstration_kinds, "prompts.demonstration_kinds")
    groups = loaded["eft"]
    as_they_came = groups._replace(rows=data.spread(groups.rows, seed.eft_groups))
    loaded["eft"] = _to_judge_by(seed, groups, ift) if teaches_judging else as_they_came
    return SeedData(
        ift=ift,
        demonstrations=[row["instruction"] for row in shown],
        eft=loaded["eft"].rows,
        heldout=data.spread(loaded["heldout"].rows, wanted.heldout_groups),
        evaluation=data.spread(loaded["evaluation"].rows, wanted.prompts),
        attacks=attacks if wanted.attacks else [],
        requests=requests if wanted.refusals else [],
        own_prompts=list(dict.fromkeys(own)),
        suites=taken,
        measuring=watch,
        set_aside={name: file.set_aside for name, file in loaded.items() if file.set_aside},
        identities={name: file.identity for name, file in loaded.items()}
        | {"attacks": digest(attacks), "requests": digest(requests)}
        | ({"keep_out": digest(list(others.values()))} if others else {}),
    )


def _files(config: RunConfig) -> dict[str, data.Loaded]:
    """Read the files, and split EFT's where a part of it is to measure."""
    seed = config.seed_data
    check = data.check_judged if seed.eft_targets == "written" else data.unchecked
    loaded = {
        "ift": data.load(data.named(seed.ift, "instructions.jsonl"), "examples"),
        "eft": data.load(data.named(seed.eft, "ranked.jsonl"), "groups", check=check),
        "evaluation": data.load(data.named(seed.evaluation, "evaluation.jsonl"), "prompts"),
    }
    if seed.heldout == "split":
        training, measuring = eft.split(loaded["eft"].rows, seed.heldout_share)
        if not training or not measuring:
            raise DataError(
                f"seed_data.heldout=split: expected enough groups in {seed.eft} for both parts, got {len(training)} to "
                f"train and {len(measuring)} to measure. Give a file of its own, or another heldout_share."
            )
        loaded["eft"] = loaded["eft"]._replace(rows=training)
        loaded["heldout"] = data.Loaded(measuring, [], digest(measuring))
    else:
        loaded["heldout"] = data.load(data.named(seed.heldout, "heldout.jsonl"), "groups")
    if config.prompts.file:
        loaded["prompts"] = data.load(config.prompts.file, "prompts")
    return loaded


def _to_judge_by(seed: SeedDataConfig, groups: data.Loaded, ift: Sequence[Mapping[str, Any]]) -> data.Loaded:
    """Choose the groups that teach judging and, where their ranks are to score them, score them."""
    if seed.eft_targets in ("written", "self_taught"):
        return groups._replace(rows=data.spread(groups.rows, seed.eft_groups))
    rows, taught = eft.apart_from(groups.rows, ift)
    chosen, common = data.spread(rows, seed.eft_groups), []
    if seed.eft_targets == "ranked":
        chosen, common = eft.thinned(eft.scored(chosen))
    if not chosen:
        raise DataError(
            f"seed_data.eft: expected ranked groups whose prompts IFT does not teach, got {len(taught)} that it does. "
            "Set seed_data.ift_rows to leave some over, or give another file."
        )
    aside = [data.SetAside(None, "its prompt teaches answering", group["prompt"][:300]) for group in taught]
    aside += [data.SetAside(None, f"score {r['score']} is over-common", r["text"][:300]) for _, r in common]
    return groups._replace(rows=chosen, set_aside=groups.set_aside + aside)


def _without_copies(loaded: Mapping[str, data.Loaded], watch: contamination.Watch) -> dict[str, data.Loaded]:
    """Set aside what would train and is a copy of what measures. Raises DataError where nothing else is left.

    Prompts, the user's and the model's, meet the same watch where they are taken in.
    """
    clean: dict[str, data.Loaded] = {}
    for name in ("ift", "eft"):
        rows, copies = watch.sift(loaded[name].rows, data.asked)
        if copies and not rows:
            raise DataError(f"{name}: expected rows that copy nothing that measures, got none: {copies[0][1]}.")
        aside = [data.SetAside(None, str(copy), data.asked(row)[0][:300]) for row, copy in copies]
        clean[name] = loaded[name]._replace(rows=rows, set_aside=loaded[name].set_aside + aside)
    return clean
