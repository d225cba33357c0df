"""measures: what the reports' tables show: name of a measure to the words that stand before its line."""

from srlm_core.suites import SUITES
from srlm_core.summary import Summary

OF_THE_JUDGE = {
    "judge_pairwise_accuracy": "pairwise accuracy",
    "judge_pairwise_accuracy_tie_half": "… ties as halves",
    "judge_pairwise_accuracy_no_ties": "… without ties",
    "judge_pairwise_accuracy_near_length": "… at nearly equal length",
    "longer_accuracy": "… of always the longer",
    "judge_longer_preferred_at_equal_rank": "takes the longer of equals",
    "judge_first_preferred": "of two, takes the first",
    "judge_better_preferred": "of two, takes the better",
    "own_answer_place": "own answer's place among people's",
    "own_answer_place_by_judge": "… by the frozen judge",
    "self_preference": "… the difference: self-preference",
    "judge_tie_rate": "ties",
    "judge_exact_match": "exact order",
    "judge_five_best": "5 given to a best",
    "judge_spearman": "Spearman",
    "judge_kendall": "Kendall",
    "readable_rate": "readable",
    "text_readable_rate": "readable as text",
    "score_mean": "mean score",
    "pass_agreement": "two passes say the same",
}
OF_THE_ANSWERS = {
    "response_length_tokens_mean": "tokens of an answer",
    "response_truncated_rate": "cut at max_tokens",
    "response_repetition": "repeated 4-grams",
    "response_distinct_1": "distinct words",
    "response_distinct_2": "distinct pairs of words",
    "response_refused_rate": "refusals",
    "refused_harmful": "… of harmful requests",
    "refused_harmless": "… of harmless ones that sound so",
}
OF_THE_MATCHES = {
    "win_rate_vs_sft_baseline": "wins against sft_baseline",
    "length_controlled_win_rate_vs_sft_baseline": "… at equal length",
    "win_rate_vs_M0": "wins against M0",
}
OF_THE_ITERATION = {
    "prompts/kept": "prompts kept",
    "prompts/yield": "… of those that were asked for",
    "responses/length_tokens_mean": "tokens of a response",
    "responses/truncated_rate": "… cut at max_tokens",
    "judgments/readable_rate": "judgments that could be read",
    "judgments/score_mean": "mean score",
    "judgments/score_entropy": "… entropy of the scores, bits",
    "judgments/spread_over_passes": "… spread over passes",
    "judgments/score_length_correlation": "… rank correlation with length",
    "judgments/tie_rate": "prompts tied",
    "pairs/n": "pairs",
    "pairs/n_of_judgments": "… of judgments, beside them",
    "pairs/yield": "… prompts that gave one",
    "pairs/margin_mean": "… score between chosen and rejected",
    "pairs/chosen_length_tokens_mean": "… tokens of the chosen",
    "pairs/rejected_length_tokens_mean": "… tokens of the rejected",
    "training/agreement": "SCIR-style training: verdict and log-ratios agree",
    "training/masked": "… pairs not learnt from",
    "training/order_flips": "… verdicts that the order decides",
    "training/generative_confidence": "… verdict's distance from 1/2",
    "training/implicit_confidence": "… log-ratios' distance from 1/2",
    "training/divergence": "… divergence of the two, nats",
    "training/entropy_of_rewards": "… entropy of the two, nats",
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
    """Name the lines of the published benchmarks that were taken."""
    keys = {name.removeprefix("evaluation/") for of in found.of_model.values() for name in of}
    prefixes = tuple(f"{suite}_" for suite in (*SUITES, "capability"))
    there = [key for key in sorted(keys) if key.startswith(prefixes) and not key.endswith(("_stderr", "_n"))]
    known = {key: label for key, label in OF_THE_SUITES.items() if key in there}
    return known | {key: key.removeprefix("capability_").replace("_", " ") for key in there if key not in known}
