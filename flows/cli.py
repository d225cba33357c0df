"""srlm: the command line. Heavy imports wait inside the commands, so that `srlm --help` answers at once."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Self-rewarding language models: run the loop, look at what it made, compare.",
)  # fmt: skip

Root = Annotated[Path, typer.Option(help="Folder of the campaigns.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Size = Annotated[str | None, typer.Option(help="Size of the recipe; see `srlm recipes`.")]
Sets = Annotated[list[str], typer.Option("--set", help="Override a setting, e.g. responses.n=8. Repeatable.")]
ModelPath = Annotated[str | None, typer.Option("--model", help="Your own model: a checkpoint folder or hub id.")]
PromptsFile = Annotated[
    str | None,
    typer.Option("--prompts", help="Your own prompts (.jsonl with `prompt`, or .txt), mixed in half and half."),
]
RUNS = Path("runs")


def _say_stopped() -> None:
    typer.echo("stopped. Nothing finished is lost: the same command goes on from here.", err=True)


def main() -> None:
    """Run a command; errors that a user can mend are printed without a traceback."""
    from srlm_core.errors import SrlmError

    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except SrlmError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        _say_stopped()
        sys.exit(130)
    except SystemExit as done:
        if done.code == 130:  # Typer ends a Ctrl-C this way, without a word
            _say_stopped()
        raise
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except Exception as error:
        show_usage = getattr(error, "show", None)
        if callable(show_usage):  # wrong usage: Click's own words
            show_usage()
            sys.exit(getattr(error, "exit_code", 2))
        raise


def _load(recipe: str, size: str | None, overrides: list[str], model: str | None, prompts: str | None) -> Any:
    from srlm_core import recipes

    own = [f"model.path={json.dumps(model)}"] if model else []
    own += [f"prompts.file={json.dumps(_absolute(prompts))}", "prompts.file_share=0.5"] if prompts else []
    return recipes.load(recipe, size, [*own, *overrides])


def _absolute(file: str) -> str:
    path = Path(file).expanduser()
    return str(path.resolve()) if path.exists() else file  # else a dataset of the hub


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe, `smoke`, `demo`, or the path of a TOML file.")],
    size: Size = None,
    sets: Sets = [],  # noqa: B006 - Typer reads it, nothing changes it
    name: Annotated[str | None, typer.Option(help="Name of the campaign; default: the recipe and its size.")] = None,
    root: Root = RUNS,
    model: ModelPath = None,
    prompts: PromptsFile = None,
    redo: Annotated[bool, typer.Option(help="Go on though settings changed; what they change is made again.")] = False,
    fork: Annotated[
        str | None, typer.Option(help="Start a campaign of this name that shares what is unchanged.")
    ] = None,
    prefect: Annotated[bool, typer.Option(help="Show the campaign to Prefect.")] = True,
    mlflow: Annotated[bool, typer.Option(help="Record the campaign in MLflow.")] = True,
    as_json: AsJson = False,
) -> None:
    """Run a campaign, or go on with one: the same command resumes it."""
    from flows.running import run_recipe

    config = _load(recipe, size, sets, model, prompts)
    name = name or (recipe if recipe in ("smoke", "demo") else f"{config.recipe}-{config.size}")
    run_recipe(config, name, root, redo=redo, fork=fork, use_prefect=prefect, use_mlflow=mlflow, as_json=as_json)


@app.command()
def plan(
    recipe: str,
    size: Size = None,
    sets: Sets = [],  # noqa: B006 - as in `run`
    model: ModelPath = None,
    prompts: PromptsFile = None,
    gpus: Annotated[int, typer.Option(min=0, help="Plan for this many GPUs instead of this machine's cores.")] = 0,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of one node: a replica lies on one.")] = 8,
    sampling_rate: Annotated[
        float | None, typer.Option(min=0.001, help="Tokens a second that one GPU generates, where it was measured.")
    ] = None,
    training_rate: Annotated[
        float | None, typer.Option(min=0.001, help="Tokens a second that one GPU learns in SFT, where measured.")
    ] = None,
    parameters: Annotated[
        float | None, typer.Option(min=1, help="Parameters of the model, such as 70e9, where its files are not here.")
    ] = None,
    root: Root = RUNS,
    as_json: AsJson = False,
) -> None:
    """Say what a campaign will cost: requests, tokens, memory, disk, hours, with the arithmetic. Loads nothing."""
    from flows.looking import Cluster, planned
    from srlm_core.plan import as_dict

    machines = Cluster(gpus, gpus_per_node, sampling_rate, training_rate)
    lines = planned(_load(recipe, size, sets, model, prompts), root, machines, int(parameters) if parameters else None)
    if as_json:
        typer.echo(json.dumps(as_dict(lines), indent=2))
        return
    for line in lines:
        number = f"{line.value:,.0f}" if line.value >= 100 else f"{line.value:.3g}"
        typer.echo(f"{line.what:<22}{number:>16} {line.unit:<10} {line.arithmetic}")
    if not (sampling_rate and training_rate):
        typer.echo("Hours rest on stated rates, not on a measurement of your model on your machine.")


@app.command()
def report(
    campaign: str,
    root: Root = RUNS,
    publish: Annotated[
        Path | None, typer.Option(help="Write it here instead: numbers and figures, no text of prompts or responses.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a campaign's report again, and say where it is."""
    from flows.looking import folder_of
    from srlm_core import publishing, table
    from srlm_core.report import write_report

    folder = folder_of(root, campaign)
    page = publishing.publish(folder, publish) if publish else write_report(folder)
    rows = table.of_campaign(folder)
    typer.echo(
        json.dumps({"report": str(page), "models": rows}, indent=2) if as_json else f"{table.as_text(rows)}\n{page}"
    )


@app.command()
def approve(
    campaign: str,
    stop: Annotated[bool, typer.Option("--stop", help="End the campaign here instead.")] = False,
    root: Root = RUNS,
) -> None:
    """Decide on the iteration that a campaign finished last: it goes on with the next one (gates.approval)."""
    from flows.looking import folder_of
    from srlm_core import approval

    t = approval.decide(folder_of(root, campaign), go_on=not stop)
    next_one = "it ends there." if stop else f"the same run command goes on with iteration {t + 1}."
    typer.echo(f"{campaign}: decided after iteration {t}: {next_one}")


@app.command()
def show(campaign: str, prompt_id: str, root: Root = RUNS) -> None:
    """Show one prompt's way through the house: responses, judgments, scores, pair."""
    from flows.looking import folder_of
    from srlm_core.show import show as show_prompt

    typer.echo(show_prompt(folder_of(root, campaign), prompt_id))


@app.command()
def compare(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Two or more: a campaign is read, a recipe is run first. What is both is read; campaign:NAME and "
            "recipe:NAME say which is meant. Differences are from the first."
        ),
    ],
    size: Size = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Run each recipe with the seeds 0 to n - 1.")] = 1,
    sets: Annotated[
        list[str],
        typer.Option("--set", help="Override a setting, of one recipe alone by RECIPE:key=value. Repeatable."),
    ] = [],  # noqa: B006 - as in `run`
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens that each method is to generate: sets prompts.target by the plan.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Begins the campaigns' names; default: compare-SIZE.")] = None,
    root: Root = RUNS,
    model: ModelPath = None,
    prompts: PromptsFile = None,
    redo: Annotated[bool, typer.Option(help="Go on though settings changed; what they change is made again.")] = False,
    prefect: Annotated[bool, typer.Option(help="Show the campaigns to Prefect.")] = True,
    mlflow: Annotated[bool, typer.Option(help="Record the campaigns in MLflow.")] = True,
    as_json: AsJson = False,
) -> None:
    """Hold methods against each other: run or read them, and print one table with errors. The same command resumes."""
    from flows import comparing
    from srlm_core import standings

    asked = comparing.Asked(
        names, size, seeds, sets, tokens, name, model, _absolute(prompts) if prompts else None, redo, prefect, mlflow,
        as_json,
    )  # fmt: skip
    table, page = comparing.compare(root, asked)
    told = {"page": str(page), "methods": standings.as_dicts(table), "caveats": standings.caveats(table)}
    typer.echo(json.dumps(told, indent=2) if as_json else f"{standings.as_text(table)}\n{page}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint folder or hub id.")],
    recipe: str = "self_rewarding",
    size: Size = None,
    sets: Sets = [],  # noqa: B006 - as in `run`
    ranked: Annotated[
        str | None, typer.Option(help="Only how it judges this file of rankings or labelled pairs, all of it.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Its name; default: from the model and the file.")] = None,
    root: Root = RUNS,
    redo: Annotated[bool, typer.Option(help="Go on though settings changed; what they change is asked again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure any model as judge and as policy, with the recipe's evaluation settings; nothing is asked twice."""
    from flows.running import evaluate_model, evaluation_name

    if ranked:
        sets = [f"seed_data.heldout={json.dumps(_absolute(ranked))}", "evaluation.heldout_groups=null", *sets]
    name = name or evaluation_name(_absolute(model), _absolute(ranked) if ranked else None)
    config = _load(recipe, size, sets, model, None)
    results = evaluate_model(config, name, root, model, judging_only=ranked is not None, redo=redo)
    typer.echo(json.dumps(results, indent=2) if as_json else f"{_spell(results)}\nkept in {root / name}")


def _spell(results: dict[str, Any], indent: str = "") -> str:
    lines: list[str] = []
    for key, value in results.items():
        if isinstance(value, dict) and set(value) != {"value", "stderr", "n"}:
            lines += [
                f"{indent}{key}:" + ("" if value else " none"),
                *([_spell(value, indent + "  ")] if value else []),
            ]
        else:
            lines.append(f"{indent}{key}: {_figure(value)}")
    return "\n".join(lines)


def _figure(value: Any) -> str:
    if isinstance(value, dict):
        error = "" if value["stderr"] is None else f" ± {value['stderr']:.3f}"
        return "not measured" if value["value"] is None else f"{value['value']:.3f}{error} (n = {value['n']})"
    if value is None:
        return "not measured"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


@app.command("data")
def data_(
    file: Annotated[str, typer.Argument(help="A file (also .gz), a dataset's folder, or a dataset of the hub.")],
    language: Annotated[str, typer.Option(help="Taken where the rows say theirs.")] = "en",
    as_json: AsJson = False,
) -> None:
    """Show what a file holds, what would be taken of it, and what was set aside, and why."""
    from srlm_core import sources

    found = sources.read(file, language=language)
    typer.echo(json.dumps(found.as_dict(), indent=2) if as_json else sources.as_text(found))


@app.command()
def winrate(
    annotations: Annotated[Path, typer.Argument(help="CSV (also .gz) or AlpacaEval's annotations.json.")],
    difficulties: Annotated[
        Path | None, typer.Option(help="CSV: instruction, difficulty; where you have the official ones.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Turn annotations against one baseline into win rates, plain and length-controlled, with their errors."""
    from srlm_core import winrate as rates

    found = rates.read(annotations)
    known = rates.read_difficulties(difficulties) if difficulties else None
    measured = rates.win_rates(found.verdicts, difficulties=known)
    if as_json:
        models = {model: rate._asdict() for model, rate in measured.items()}
        typer.echo(json.dumps({"baseline": found.baseline, "models": models, "set_aside": found.set_aside}, indent=2))
        return
    typer.echo(rates.as_text(found, measured))


@app.command()
def simulate(
    seeds: Annotated[int, typer.Option(min=2, max=1000, help="Campaigns of each kind; intervals are over them.")] = 32,
    flaws: Annotated[
        list[str],
        typer.Option("--flaw", help="Only this: noise, length, position, leniency or self_preference. Repeatable."),
    ] = [],  # noqa: B006 - as in `run`
    out: Annotated[Path, typer.Option(help="Folder of the page and the data.")] = RUNS / "simulation",
    as_json: AsJson = False,
) -> None:
    """Try the methods on a judge of known flaws, in a world of numbers: no model, no engine, minutes."""
    from flows.looking import simulated
    from srlm_core import simulation_report

    ends, page = simulated(flaws, seeds, out)
    if as_json:
        typer.echo(json.dumps({"page": str(page), "seeds": seeds, **simulation_report.as_dict(ends)}, indent=2))
        return
    typer.echo(f"{simulation_report.as_text(ends)}\n{page}")


@app.command()
def recipes(
    settings: Annotated[
        bool, typer.Option("--settings", help="Print the JSON schema of all settings, for editors.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the recipes and their sizes."""
    from srlm_core import recipes as shipped
    from srlm_core.config import schema

    if settings:
        typer.echo(json.dumps(schema(), indent=2))
        return
    found = {
        name: {size: body.get("description", "") for size, body in shipped.read(name).sizes.items()}
        for name in shipped.names()
    }
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for name, sizes in found.items():
        typer.echo(name)
        for size, description in sizes.items():
            typer.echo(f"  --size {size:<8} {description}")
    typer.echo("smoke, demo: self_rewarding at that size")


@app.command()
def vote(
    campaign: str,
    newer: str,
    older: str,
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts to vote on.")] = 50,
    root: Root = RUNS,
) -> None:
    """Write a page on which people vote blind between two models' answers."""
    from flows.looking import folder_of
    from srlm_core import votes

    typer.echo(votes.write_page(folder_of(root, campaign), newer, older, prompts))
    typer.echo(f"Open it in a browser, or send it; then: srlm votes {campaign} FILE…")


@app.command()
def votes(campaign: str, files: list[Path], root: Root = RUNS, as_json: AsJson = False) -> None:
    """Take in files of votes, and say what people think."""
    from flows.looking import folder_of
    from srlm_core import votes as votes_
    from srlm_core.report import write_report

    folder = folder_of(root, campaign)
    found = votes_.read(folder, files)
    write_report(folder)
    typer.echo(json.dumps(found, indent=2) if as_json else _spell(found))


@app.command("ifeval")
def ifeval_(
    responses: Annotated[str, typer.Argument(help="Responses: rows with `prompt` and `response`.")],
    questions: Annotated[str, typer.Option(help="IFEval's input_data.jsonl, or a dataset such as google/IFEval.")],
    as_json: AsJson = False,
) -> None:
    """Check given responses as IFEval does: strict and loose, of prompts and of instructions."""
    from srlm_core.suites import ifeval

    found = ifeval.scores_of_file(questions, responses)
    typer.echo(json.dumps(found, indent=2) if as_json else _spell(found))


@app.command()
def export(
    campaign: str,
    model: Annotated[str | None, typer.Option(help="Which model; default: the last one.")] = None,
    to: Annotated[Path | None, typer.Option(help="Folder to write into; default: export/ of the campaign.")] = None,
    push: Annotated[str | None, typer.Option(help="Upload it to OWNER/NAME of the hub, for you alone to see.")] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: for everybody to see.")] = False,
    datasets: Annotated[
        bool, typer.Option("--datasets", help="The datasets, too; with --push to OWNER/NAME-data.")
    ] = False,
    root: Root = RUNS,
    as_json: AsJson = False,
) -> None:
    """Write a campaign's model for others to load, with a card made from the campaign's records."""
    from flows.leaving import export as write_export

    told = write_export(root, campaign, model, to, push=push, public=public, datasets=datasets)
    if as_json:
        typer.echo(json.dumps(told, indent=2))
        return
    for what, where in told.items():
        typer.echo(f"{what:<9}{where if isinstance(where, str) else ', '.join(where)}")


@app.command()
def clean(
    campaign: str,
    root: Root = RUNS,
    keep: Annotated[list[str], typer.Option("--keep", help="A model whose weights stay. Repeatable.")] = [],  # noqa: B006
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what of a campaign can go, the room it gives back and what is impossible then; delete it with --yes."""
    from flows.leaving import to_clean
    from srlm_core import cleaning

    with to_clean(root, campaign, keep) as (folder, found):
        told = [{"what": one.what, "bytes": one.bytes, "then": one.then} for one in found]
        if not as_json:
            typer.echo(cleaning.as_text(found))
        asked = not yes and bool(found) and not as_json and sys.stdin.isatty()
        sure = yes or (asked and typer.confirm("Delete all of this?"))
        if sure:
            cleaning.delete(folder, found)
        if as_json:
            typer.echo(json.dumps({"deleted": sure, "found": told}, indent=2))
        elif found:
            typer.echo("deleted." if sure else "Nothing was deleted: say --yes to delete it.")


@app.command()
def doctor(root: Root = RUNS, as_json: AsJson = False) -> None:
    """Say whether this machine is fit, which engine would run, and what to do."""
    from flows.looking import examine

    findings = examine(root)
    if as_json:
        typer.echo(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        for finding in findings:
            typer.echo(f"{'ok  ' if finding.ok else 'look'} {finding.what:<14} {finding.found}")
            if finding.remedy:
                typer.echo(f"     {'':<14} → {finding.remedy}")
    if not all(finding.ok for finding in findings if finding.needed):
        raise typer.Exit(1)


@app.command()
def chat(model: Annotated[str, typer.Argument(help="A checkpoint folder, such as runs/demo/models/M3.")]) -> None:
    """Talk to a model. An empty line or the end of input ends."""
    from flows.looking import talk

    talk(model)


if __name__ == "__main__":
    main()
