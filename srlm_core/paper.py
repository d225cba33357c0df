"""paper: what the paper measured of its own models (Llama 2 70B), to stand beside ours (arXiv:2401.10020)."""

from typing import NamedTuple


class Published(NamedTuple):
    """One measure of the paper's four models, shares as numbers from 0 to 1; null: not published."""

    sft: float | None
    m1: float | None
    m2: float | None
    m3: float | None


FIGURES: dict[str, Published] = {
    # table 4
    "judge_pairwise_accuracy": Published(0.651, 0.787, 0.804, 0.817),
    "judge_five_best": Published(0.396, 0.415, 0.443, 0.432),
    "judge_exact_match": Published(0.101, 0.131, 0.143, 0.143),
    "judge_spearman": Published(0.253, 0.279, 0.331, 0.349),
    "judge_kendall": Published(0.233, 0.253, 0.315, 0.324),
    # table 1 and section 3.2.1
    "alpaca_eval_win_rate": Published(None, 0.0994, 0.1538, 0.2044),
    "alpaca_eval_chars": Published(None, 1092, 1552, 2552),
    # tables 2 and 10
    "mt_bench_score": Published(6.85, 6.78, 7.01, 7.25),
    "mt_bench_writing": Published(8.83, 9.10, 9.10, 9.58),
    "mt_bench_roleplay": Published(8.15, 7.65, 8.00, 8.73),
    "mt_bench_reasoning": Published(5.30, 4.35, 4.60, 4.80),
    "mt_bench_math": Published(3.00, 3.05, 3.30, 3.50),
    "mt_bench_coding": Published(3.50, 4.10, 4.25, 4.20),
    "mt_bench_extraction": Published(6.90, 7.20, 7.65, 7.80),
    "mt_bench_stem": Published(9.18, 8.93, 9.40, 9.45),
    "mt_bench_humanities": Published(9.95, 9.85, 9.80, 9.95),
    # table 9; multiple choice by the likelier answer, shots not known
    "capability_arc_easy_acc": Published(0.7649, 0.7814, 0.7484, 0.7235),
    "capability_arc_challenge_acc": Published(0.5597, 0.5751, 0.5451, 0.5313),
    "capability_hellaswag_acc": Published(0.8517, 0.8499, 0.8427, 0.8329),
    "capability_social_iqa_acc": Published(0.5148, 0.5302, 0.5123, 0.4928),
    "capability_piqa_acc": Published(0.8259, 0.8292, 0.8194, 0.8079),
    "capability_gsm8k_exact_match_strict_match": Published(0.5072, 0.6027, 0.5929, 0.5770),
    "capability_mmlu_acc": Published(0.6976, 0.6934, 0.6931, 0.6937),
    "capability_openbookqa_acc": Published(0.5780, 0.5760, 0.5760, 0.5840),
    "capability_nq_open_exact_match_remove_whitespace": Published(0.3435, 0.3548, 0.3307, 0.3186),
}
"""By the name that the measure has in a campaign's metrics."""

MATCHES: dict[tuple[str, str], tuple[float, float, float]] = {
    ("M1", "sft_baseline"): (0.305, 0.387, 0.309),
    ("M2", "sft_baseline"): (0.492, 0.363, 0.145),
    ("M3", "sft_baseline"): (0.625, 0.277, 0.098),
    ("M2", "M1"): (0.555, 0.328, 0.117),
    ("M3", "M2"): (0.477, 0.398, 0.125),
    ("M3", "M1"): (0.688, 0.227, 0.086),
}
"""(newer, older) to win, tie and lose; GPT-4 on 256 prompts (figure 3)."""
