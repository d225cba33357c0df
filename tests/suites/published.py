"""Small benchmarks of our own writing, in the forms in which the real ones are published."""

import json
from pathlib import Path


def lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def alpaca_eval(folder: Path, n: int = 6) -> Path:
    rows = [
        {"dataset": f"set {i % 2}", "instruction": f"How does lighthouse keeper number {i} spend a winter evening?",
         "output": "Sound: he reads. " * (i % 3 + 1), "generator": "the_baseline"}
        for i in range(n)
    ]  # fmt: skip
    path = folder / "reference.json"
    path.write_text(json.dumps(rows))
    return path


def mt_bench(folder: Path) -> Path:
    kinds = ["writing", "math", "stem"]
    questions = [
        {"question_id": 81 + i, "category": kind, "turns": [f"Which stone of {kind} is heavier?", "Say it as a rhyme."]}
        for i, kind in enumerate(kinds)
    ]
    lines(folder / "mt" / "question.jsonl", questions)
    right = [{"question_id": 82, "choices": [{"turns": ["The grey one.", "The grey one, hear, is heavier."]}]}]
    lines(folder / "mt" / "reference_answer_gpt-4.jsonl", right)
    return folder / "mt"


def arena_hard(folder: Path, n: int = 3) -> Path:
    """Of both published versions, in turn."""
    questions = [
        {"uid": f"u{i}", "category": "hard", "prompt": f"Write a program that sorts train number {i} into yards."}
        if i % 2
        else {"question_id": f"u{i}", "cluster": "trains",
              "turns": [{"content": f"Write a program that sorts train number {i} into yards."}]}
        for i in range(n)
    ]  # fmt: skip
    said = [
        {"uid": f"u{i}", "messages": [{"role": "assistant", "content": {"answer": f"Baseline {i}."}}]}
        if i % 2
        else {"question_id": f"u{i}", "choices": [{"turns": [{"content": f"Baseline {i}."}]}]}
        for i in range(n)
    ]
    lines(folder / "arena" / "question.jsonl", questions)
    lines(folder / "arena" / "model_answer" / "baseline-model.jsonl", said)
    return folder / "arena"


def ifeval(folder: Path) -> Path:
    rows = [
        {"key": 1, "prompt": "Name three birds without commas.", "instruction_id_list": ["punctuation:no_comma"],
         "kwargs": [{}]},
        {"key": 2, "prompt": "Write at least five words, in lower case.",
         "instruction_id_list": ["change_case:english_lowercase", "length_constraints:number_words"],
         "kwargs": [{}, {"relation": "at least", "num_words": 5, "num_sentences": None}]},
        {"key": 3, "prompt": "Say the word heron.", "instruction_id_list": ["keywords:existence"],
         "kwargs": [{"keywords": ["heron"]}]},
    ]  # fmt: skip
    return lines(folder / "input_data.jsonl", rows)
