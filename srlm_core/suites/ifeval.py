"""ifeval: IFEval (Zhou et al., arXiv:2311.07911): instructions whose following a program can check.

The checks are lm-evaluation-harness's own code for its task `ifeval`; so are the four accuracies.
"""

import contextlib
import importlib.util
import io
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from srlm_core.errors import ConfigError, DataError
from srlm_core.rates import Rate, rate
from srlm_core.suites.record import Item, Suite, by_item, rows_of

_PROMPT = ("prompt_level_strict_acc", "prompt_level_loose_acc")
_INSTRUCTION = ("inst_level_strict_acc", "inst_level_loose_acc")


def read(where: str) -> list[Item]:
    """Read IFEval's input_data.jsonl, or its dataset: rows with key, prompt, instruction_id_list and kwargs."""
    rows = rows_of(where, ("prompt", "instruction_id_list", "kwargs"))
    return [Item(str(row.get("key", place)), (row["prompt"],), "", (), 0.0, row) for place, row in enumerate(rows)]


def measure(items: Sequence[Item], answers: pa.Table, verdicts: pa.Table | None) -> dict[str, Any]:
    """Return the four accuracies over the questions that were answered."""
    return scores((item.published, row["response"]) for item, (row, *_) in by_item(items, answers))


def scores_of_file(questions: str, responses: str) -> dict[str, Any]:
    """Check a file of responses ({"prompt", "response"}) to the questions; of a prompt's responses, the last.

    `not_asked` and `not_answered` count responses without a question and questions without a response. Raises DataError
    where nothing matches.
    """
    asked = {item.turns[0]: item.published for item in read(questions)}
    said = {
        row["prompt"]: row["response"] for row in rows_of(responses, ("prompt", "response"), may_be_empty="response")
    }
    both = asked.keys() & said.keys()
    if not both:
        raise DataError(f"expected responses in {responses} to prompts of {questions}, got none of {len(said)}.")
    found = scores((asked[prompt], said[prompt]) for prompt in asked if prompt in both)
    return found | {"not_asked": len(said) - len(both), "not_answered": len(asked) - len(both)}


def scores(answered: Iterable[tuple[Mapping[str, Any], str]]) -> dict[str, Any]:
    """Check responses to rows of IFEval's; strict and loose, of prompts and of instructions.

    Instructions of one prompt are not independent: their error is by prompts. `unchecked` counts prompts with a check
    that cannot run here, for two of the 25 kinds need NLTK's `punkt_tab`; they are in no rate. Raises ConfigError where
    lm-eval is not installed.
    """
    check = _checker()
    results: list[dict[str, Any]] = []
    unchecked = 0
    for row, response in answered:
        known = {"key": row.get("key"), "prompt": row["prompt"], "instruction_id_list": row["instruction_id_list"]}
        kwargs = [{name: value for name, value in one.items() if value is not None} for one in row["kwargs"]]
        drawn = random.getstate()
        random.seed(0)  # the harness draws a letter where the one asked for is none, such as the `!` of question 1129
        try:
            results.append(check({**known, "kwargs": kwargs}, [response]))
        except LookupError:
            unchecked += 1
        finally:
            random.setstate(drawn)
    told: dict[str, Any] = {name: rate([float(one[name]) for one in results])._asdict() for name in _PROMPT}
    told |= {name: _by_prompt([one[name] for one in results])._asdict() for name in _INSTRUCTION}
    return told | {"unchecked": unchecked}


def _by_prompt(followed: Sequence[Sequence[bool]]) -> Rate:
    """Return the share of instructions that were followed, its error by prompts (a ratio of sums)."""
    n = sum(map(len, followed))
    if not n:
        return rate([])
    share = sum(map(sum, followed)) / n
    spread = sum((sum(one) - share * len(one)) ** 2 for one in followed)
    return Rate(share, spread**0.5 / n, n)


def _checker() -> Any:
    try:
        _offer_punkt()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            from langdetect import DetectorFactory
            from lm_eval.tasks.ifeval.utils import process_results  # asks the network for punkt_tab where it is missing
    except ImportError as error:
        raise ConfigError(
            f"evaluation.suites.ifeval: expected lm-eval, which checks the answers, got: {error}. "
            "pip install 'srlm[suites]'."
        ) from error
    DetectorFactory.seed = 0  # it draws; the same answer must get the same score
    return process_results


def _offer_punkt() -> None:
    """Let NLTK find `punkt_tab` inside llama-index-core, where that is installed: then nothing is downloaded."""
    import nltk.data

    found = importlib.util.find_spec("llama_index")  # a namespace: looking for it runs none of its code
    for place in (found.submodule_search_locations or ()) if found else ():
        carried = str(Path(place) / "core" / "_static" / "nltk_cache")
        if carried not in nltk.data.path:
            nltk.data.path.append(carried)


SUITE = Suite("ifeval", read, measure)
