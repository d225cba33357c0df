"""measures: the lines of the reports' tables, and the measure that each shows."""

from srlm_core.suites import SUITES
from srlm_core.summary import Summary

OF_THE_JUDGE = {
    "pairwise accuracy": "judge_pairwise_accuracy",
    "… ties as halves": "judge_pairwise_accuracy_tie_half",
    "… without ties": "judge_pairwise_accuracy_no_ties",
    "… at nearly equal length": "judge_pairwise_accuracy_near_length",
    "… of always the longer": "longer_accuracy",
    "takes the longer of equals": "judge_longer_preferred_at_equal_rank",
    "of two, takes the first": "judge_first_preferred",
    "of two, takes the better": "judge_better_preferred",
    "own answer's place among people's": "own_answer_place",
    "… by the frozen judge": "own_answer_place_by_judge",
    "… the difference: self-preference": "self_preference",
    "ties": "judge_tie_rate",
    "exact order": "judge_exact_match",
    "5 given to a best": "judge_five_best",
    "Spearman": "judge_spearman",
    "Kendall": "judge_kendall",
    "readable": "readable_rate",
    "readable as text": "text_readable_rate",
    "mean score": "score_mean",
    "two passes say the same": "pass_agreement",
}
OF_THE_ANSWERS = {
    "cut at max_tokens": "response_truncated_rate",
    "repeated 4-grams": "response_repetition",
    "distinct words": "response_distinct_1",
    "distinct pairs of words": "response_distinct_2",
    "refusals": "response_refused_rate",
    "… of harmful requests": "refused_harmful",
    "… of harmless ones that sound so": "refused_harmless",
}
"""Line of a table to the measure that it shows."""
OF_THE_ITERATION = {
    "prompts kept": "prompts/kept",
    "… of those that were asked for": "prompts/yield",
    "tokens of a response": "responses/length_tokens_mean",
    "… cut at max_tokens": "responses/truncated_rate",
    "judgments that could be read": "judgments/readable_rate",
    "mean score": "judgments/score_mean",
    "… entropy of the scores, bits": "judgments/score_entropy",
    "… spread over passes": "judgments/spread_over_passes",
    "… rank correlation with length": "judgments/score_length_correlation",
    "prompts tied": "judgments/tie_rate",
    "pairs": "pairs/n",
    "… prompts that gave one": "pairs/yield",
    "… score between chosen and rejected": "pairs/margin_mean",
    "… tokens of the chosen": "pairs/chosen_length_tokens_mean",
    "… tokens of the rejected": "pairs/rejected_length_tokens_mean",
}
OF_THE_SUITES = {
    "alpaca_eval_win_rate": "AlpacaEval 2, win rate",
    "alpaca_eval_length_controlled": "… at equal length",
    "alpaca_eval_chars": "… characters of an answer",
    "alpaca_eval_readable_rate": "… readable verdicts",
    "arena_hard_win_rate": "Arena-Hard, win rate",
    "arena_hard_flip_rate": "… verdict changes with the order",
    "arena_hard_readable_rate": "… readable verdicts",
    "ifeval_prompt_level_strict_acc": "IFEval, prompts, strict",
    "ifeval_inst_level_strict_acc": "… instructions, strict",
    "ifeval_prompt_level_loose_acc": "… prompts, loose",
    "ifeval_inst_level_loose_acc": "… instructions, loose",
    "mt_bench_score": "MT-Bench, 1 to 10",
    "mt_bench_turn_1": "… first turns",
    "mt_bench_turn_2": "… second turns",
    "mt_bench_readable_rate": "… readable grades",
}
"""Measure of a published benchmark to its line; others, such as MT-Bench's categories, follow by their own names."""


def suite_measures(found: Summary) -> dict[str, str]:
    """Name the lines of the published benchmarks: (line: measure)."""
    keys = {name.removeprefix("evaluation/") for of in found.of_model.values() for name in of}
    prefixes = tuple(f"{suite}_" for suite in (*SUITES, "capability"))
    there = [key for key in sorted(keys) if key.startswith(prefixes) and not key.endswith(("_stderr", "_n"))]
    lines = {OF_THE_SUITES[key]: key for key in OF_THE_SUITES if key in there}
    return lines | {key.removeprefix("capability_").replace("_", " "): key for key in there if key not in OF_THE_SUITES}
