import re
import shutil
from html.parser import HTMLParser

import made_up
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from srlm_core import pages, report, report_words, show, store, summary
from srlm_core.errors import DataError
from srlm_core.spelling import escape_markdown

HOSTILE = {
    "p1": "</summary></details><script>alert(1)</script>\n# A heading\n<img src=x onerror=alert(2)>",
    "r1": "````` ```\n</pre></details>\n```\n## Broken out\n[a](javascript:alert(3))",
    "r2": "\x1b[2J\x1b[31mred\x07 and \u202etxet sdrawkcab\u202c and \x9b31m",
    "jr1": "{{ 7 * 7 }} {% for x in y %} </style><style>body{display:none}</style> &lt;b&gt;",
    "x1": "<iframe src=//evil.example></iframe>",
}
VOID = {"meta", "br", "hr", "img", "link", "input", "rect", "use", "path"}


class Page(HTMLParser):
    """The tags and attributes of a page, its balance, and the text that a reader sees."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.seen = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.seen.append(data)


def written(folder):
    page = report.write_report(folder)
    return page.read_text(), (page.parent / "report.md").read_text()


def test_a_report_says_the_headline_numbers_with_their_errors(tmp_path):
    html, markdown = written(made_up.campaign(tmp_path))
    said = " ".join("".join(Page(html).seen).split())
    for text in (
        "M1 puts 0.45 ± 0.04 (n = 240) of the held-out pairs in the order of their ranking",
        "with ties as halves it is 0.55 ± 0.04 (n = 240), which cannot be told from guessing",
        "longer response scores 0.52 ± 0.03 (n = 240)",
        # 0.70 - 0.55, sqrt(0.04^2 + 0.04^2) = 0.057: more than two standard errors
        "From M1 to M2 the judge got better: +0.15 ± 0.06",
        "Against M1, M2 wins 60%, ties 20% and loses 20% of the prompts, 0.70 ± 0.04 (n = 100) with ties",
        "as halves: M2 wins, in the eyes of M0",
        "Against sft_baseline, M2 wins 40%, ties 20% and loses 40% of the prompts, 0.50 ± 0.04 (n = 100)",
    ):
        assert text in said
    assert "0.45 ± 0.04 (n = 240)" in markdown
    assert "| … at nearly equal length | 0.45 ± 0.09 (n = 31) |" in markdown
    assert "takes the longer of equals" not in markdown  # nothing was measured


def test_a_page_is_whole_by_itself(tmp_path):
    html, _ = written(made_up.campaign(tmp_path))
    page = Page(html)
    assert page.open == []
    assert {"script", "link", "iframe", "img", "object", "embed", "form", "base"}.isdisjoint(page.tags)
    assert all(
        value.startswith("#") for name, value in page.attributes if name in ("href", "xlink:href", "src", "action")
    )
    assert not re.findall(r"https?://|@import|url\((?!#)", html)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = [value[1:] for name, value in page.attributes if name in ("href", "xlink:href")]
    targets += re.findall(r"url\(#([^)]+)\)", html)
    assert set(targets) <= set(ids)


def test_figures_are_also_files_and_old_ones_go(tmp_path):
    folder = made_up.campaign(tmp_path)
    written(folder)
    figures = folder / "report" / "figures"
    names = {path.stem for path in figures.glob("*.svg")}
    assert names == {"judge_accuracy", "score_histogram", "length_and_score", "training", "head_to_head", "minutes"}
    assert all("var(--" not in path.read_text() and "#0" not in path.read_text() for path in figures.glob("*.svg"))
    (folder / "timings.json").unlink()
    written(folder)
    assert not (figures / "minutes.svg").exists()


def test_what_models_wrote_stays_text_in_html(tmp_path):
    folder = made_up.campaign(tmp_path, texts=HOSTILE)
    store.write_json(
        folder / "bootstrap" / "set_aside" / "ift.json", [{"line": 3, "reason": "not JSON", "text": HOSTILE["p1"]}]
    )
    store.write_json(folder / "provenance.json", {"host": "<b>h</b>", "git": {"commit": "`x`"}})
    html, _ = written(folder)
    page = Page(html)
    assert page.open == []
    assert {"script", "img", "iframe", "b"}.isdisjoint(page.tags)
    assert page.tags.count("style") == 1
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    shown = "".join(page.seen)
    for text in (HOSTILE["p1"], HOSTILE["r1"], HOSTILE["jr1"]):
        assert text in shown
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", html)
    assert "␛[31mred␇" in shown
    assert "default-src 'none'" in html


def test_what_models_wrote_stays_text_in_markdown(tmp_path):
    folder = made_up.campaign(tmp_path, texts=HOSTILE)
    store.write_json(
        folder / "bootstrap" / "set_aside" / "ift.json", [{"line": 3, "reason": "<b>", "text": "```\n<b>x"}]
    )
    _, markdown = written(folder)
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(markdown)
    inline = [child for token in tokens for child in token.children or []]
    assert not [token for token in tokens if token.type == "html_block"]
    assert {token.type for token in inline} <= {
        "text",
        "softbreak",
        "strong_open",
        "strong_close",
        "code_inline",
        "image",
        "text_special",
    }
    headings = [tokens[place + 1].content for place, token in enumerate(tokens) if token.type == "heading_open"]
    assert not [heading for heading in headings if heading in ("A heading", "Broken out")]
    fences = [token.content.rstrip("\n") for token in tokens if token.type == "fence"]
    assert HOSTILE["p1"] in fences
    assert HOSTILE["r1"] in fences
    assert show.visible(HOSTILE["r2"]) in fences


@given(st.text())
def test_nothing_breaks_out_of_a_fence(text):
    tokens = MarkdownIt("commonmark").parse(f"before\n\n{pages.fence(text)}\n\nafter")
    assert [token.type for token in tokens if token.type != "inline"] == [
        "paragraph_open", "paragraph_close", "fence", "paragraph_open", "paragraph_close",
    ]  # fmt: skip


@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cc",)), max_size=80))
def test_escaped_markdown_renders_as_the_text_itself(text):
    escaped = escape_markdown(show.visible(text))
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(f"x{escaped}x")
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    on_one_line = re.sub(r"\s+", " ", show.visible(text)).strip()
    assert "".join(child.content for child in tokens[1].children) == f"x{on_one_line}x"


def test_the_same_files_give_the_same_bytes(tmp_path):
    folder = made_up.campaign(tmp_path / "a")
    shutil.copytree(folder, tmp_path / "b" / folder.name)

    def bytes_of(campaign):
        report.write_report(campaign)
        return {path.name: path.read_bytes() for path in sorted((campaign / "report").rglob("*.*")) if path.is_file()}

    first = bytes_of(folder)
    assert first == bytes_of(folder) == bytes_of(tmp_path / "b" / folder.name)
    assert len(first) == 8


@pytest.mark.parametrize(
    "gone", ["evaluation", "iter_01", "models", "bootstrap", "config.json", "iter_01/judgments", "iter_01/responses"]
)
def test_a_half_finished_campaign_says_what_is_missing(tmp_path, gone):
    folder = made_up.campaign(tmp_path)
    path = folder / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    html, markdown = written(folder)
    missing = {
        "evaluation": "M1 is not evaluated yet", "iter_01": "iteration 1 has not begun",
        "models": "M2 is not trained yet",
        "config.json": "config.json is absent",
    }  # fmt: skip
    assert missing.get(gone, "") in html
    assert missing.get(gone, "") in markdown
    assert Page(html).open == []


def test_a_folder_with_nothing_in_it_has_a_report(tmp_path):
    html, markdown = written(tmp_path)
    assert "No model of the loop has been evaluated yet." in html
    assert "No iteration has begun." in markdown


def test_a_finished_campaign_is_not_called_unfinished(tmp_path):
    html, _ = written(made_up.campaign(tmp_path))
    assert "Not finished" not in html


def test_damaged_files_do_not_stop_a_report(tmp_path):
    folder = made_up.campaign(tmp_path)
    for path in [*folder.rglob("*.parquet"), folder / "timings.json", folder / "evaluation" / "M1" / "results.json"]:
        path.write_bytes(path.read_bytes()[:40])
    html, _ = written(folder)
    assert "iter_01/judgments/part-00001.parquet is damaged" in html


def test_every_drop_is_counted_by_stage_reason_and_iteration(tmp_path):
    drops = report.gather(made_up.campaign(tmp_path))["drops"]
    assert drops["places"] == ["iteration 1"]
    assert [(row["stage"], row["reason"], *row["counts"]) for row in drops["rows"]] == [
        ("prompts", "over_target", 5),
        ("prompts", "too_short", 2),
        ("judgments", "unreadable: no_score_line", 3),
        ("pairs", "fewer_than_two_scored", 1),
        ("pairs", "tie", 1),
    ]


def test_samples_are_the_same_wherever_they_are_drawn(tmp_path):
    folder = made_up.campaign(tmp_path)
    drawn = [story.prompt["prompt_id"] for story in show.sample(folder, 1, 2, seed=0)]
    assert drawn == [story.prompt["prompt_id"] for story in show.sample(folder, 1, 3, seed=0)][:2]
    assert len(show.sample(folder, 1, 9, seed=0)) == 3


def test_settings_that_differ_are_listed_with_their_defaults(tmp_path):
    changed = report.gather(made_up.campaign(tmp_path, responses={"n": 2}))["changed"]
    assert ("responses.n", "4", "2") in changed
    assert not [name for name, _, _ in changed if name.startswith("judgments")]


def test_the_reader_is_told_how_little_the_base_model_proves_as_a_judge(tmp_path):
    folder = made_up.campaign(tmp_path)
    said = " ".join(report.gather(folder)["cannot_say"])
    assert "M0, the very model that the campaign started from" in said
    assert (
        "it orders 0.50 ± 0.04 (n = 240) of the held-out pairs as they are ranked (ties as halves): not to be told "
        "from guessing" in said
    )
    assert "One seed (0)" in said
    made_up.head_to_head(folder, judge="org/judge-70b")
    said = " ".join(report.gather(folder)["cannot_say"])
    assert "org/judge-70b, frozen" in said
    assert "started from" not in said


def test_a_head_to_head_that_nobody_could_judge_is_no_win(tmp_path):
    folder = made_up.campaign(tmp_path)
    nothing = {
        key: made_up.rate(None, None, 0) for key in ("win", "tie", "lose", "win_or_half_tie", "flip_rate", "longer")
    }
    store.write_json(
        folder / "evaluation" / "head_to_head" / "results.json", {"judge": "M0", "comparisons": {"M2_vs_M1": nothing}}
    )
    html, _ = written(folder)
    assert "Who wins" not in html
    assert summary.model_metrics(folder, "M2")["evaluation/win_rate_vs_M1_n"] == 0


def test_a_judge_that_only_looks_at_the_order_says_nothing_of_who_is_better(tmp_path):
    folder = made_up.campaign(tmp_path)
    shares = {"win": 0.0, "tie": 1.0, "lose": 0.0, "win_or_half_tie": 0.5, "flip_rate": 1.0, "longer": 0.5}
    tied = {key: made_up.rate(share, 0.0, 40) for key, share in shares.items()}
    store.write_json(
        folder / "evaluation" / "head_to_head" / "results.json", {"judge": "M0", "comparisons": {"M2_vs_M1": tied}}
    )
    said = " ".join(" ".join(text.split()) for _, text in report.gather(folder)["headline"])
    assert "Of M2 against M1 nothing is known: M0 changed its verdict with the order on all of the 40 prompts" in said
    assert "even, as far as" not in said
    assert "scores 0.50" not in said


def test_the_scripted_engine_is_said_to_prove_nothing(tmp_path):
    html, _ = written(made_up.campaign(tmp_path, engine={"kind": "scripted"}))
    assert "nothing about language models" in html


@pytest.mark.parametrize(
    ("value", "stderr", "n", "told"),
    [
        (0.6, 0.04, 100, 1),
        (0.57, 0.04, 100, 0),
        (0.4, 0.04, 100, -1),
        (0.5, 0.0, 20, 0),
        (1.0, 0.0, 2, 0),
        (1.0, 0.0, 20, 1),
    ],
)
def test_two_standard_errors_decide_whether_a_difference_is_claimed(value, stderr, n, told):
    assert report_words.Measured(value, stderr, n).beside(0.5) == told


def test_warning_signs_are_named(tmp_path):
    folder = made_up.campaign(tmp_path)
    results = store.read_json(folder / "evaluation" / "M2" / "results.json")
    results["responses"]["tokens_mean"] = 160.0
    results["judge"]["pairwise_accuracy_tie_half"] = made_up.rate(0.3, 0.04, 240)
    results["own_answers"] = {"place": made_up.rate(0.8, 0.03, 40), "self_preference": made_up.rate(0.2, 0.05, 40)}
    store.write_json(folder / "evaluation" / "M2" / "results.json", results)
    signs = report.gather(folder)["warnings"]
    assert "M2 answers at 1.6 times the length of M1." in signs
    higher = "M2 places its own answers higher among people's than the frozen judge does, by 0.20 ± 0.05 (n = 40)."
    assert higher in signs
    results["own_answers"]["self_preference"] = made_up.rate(0.05, 0.05, 40)
    store.write_json(folder / "evaluation" / "M2" / "results.json", results)
    assert higher[:40] not in "".join(report.gather(folder)["warnings"])


@pytest.mark.parametrize(("share", "told"), [(0.03, True), (0.2, False)])
def test_too_few_pairs_are_a_warning(tmp_path, share, told):
    found = summary.collect(made_up.campaign(tmp_path))._replace(of_iteration={1: {"pairs/yield": share}})
    few = "Iteration 1: only 3% of the prompts gave a pair to learn from."
    assert (few in report_words.warnings(found, {})) == told


def test_what_an_iteration_made_is_told_with_what_changed(tmp_path):
    folder = made_up.campaign(tmp_path)
    [kept, *_] = report.gather(folder)["made"]["lines"]
    assert (kept["measure"], kept["cells"], kept["change"]) == ("prompts kept", ["3"], "")
    shutil.copytree(folder / "iter_01", folder / "iter_02")
    lines = {line["measure"]: line for line in report.gather(folder)["made"]["lines"]}
    assert lines["tokens of a response"]["cells"] == ["20", "20"]
    assert lines["judgments that could be read"]["change"] == "0.00 ± 0.12"  # sqrt(2) times 0.0878
    assert lines["pairs"]["change"] == "0"


# --- show -----------------------------------------------------------------------------------------------------------


def test_show_tells_a_prompts_whole_way(tmp_path):
    text = report.show(made_up.campaign(tmp_path), "p1")
    for line in (
        "prompt p1  iteration 1, source self_instruct, written by M1",
        "response 1  r1  10 tokens, ended by stop, score 4.33 of 3 readable  ← chosen",
        "response 2  r2  20 tokens, ended by stop, score 1.00 of 2 readable  ← rejected",
        "judgment 3 by M1: unreadable (no_score_line)",
        "judgment 4 by M1: 0, not counted (k is 3)",
        "pair pair1: r1 over r2 (4.33 over 1.00); trained M2",
    ):
        assert line in text


def test_show_says_why_there_is_no_pair(tmp_path):
    folder = made_up.campaign(tmp_path)
    assert show.show(folder, "p3").endswith("No pair (pairs: tie).")
    assert "r4  40 tokens, cut at max_tokens" in show.show(folder, "p2")
    assert "r3  30 tokens, ended by stop, no score" in show.show(folder, "p2")


def test_show_takes_a_prefix_that_is_unique(tmp_path, scripted):
    folder = scripted()
    prompt_id = next(store.iter_rows(folder / "iter_02" / "prompts"))["prompt_id"]
    assert prompt_id in show.show(folder, prompt_id[:8])
    with pytest.raises(DataError, match=r"begins several: p1, p2, p3. Give more of it"):
        show.show(made_up.campaign(tmp_path), "p")


@pytest.mark.parametrize(
    ("asked", "said"), [("p9", "Near ones: p3, p2, p1"), ("", "Near ones"), ("x1", "never kept: too_short")]
)
def test_an_unknown_prompt_is_refused_with_what_to_do(tmp_path, asked, said):
    with pytest.raises(DataError, match=said):
        show.show(made_up.campaign(tmp_path), asked)


def test_show_of_a_campaign_without_prompts_says_so(tmp_path):
    with pytest.raises(DataError, match=r"no prompts in .* yet"):
        show.show(tmp_path, "p1")


def test_hostile_text_cannot_steer_the_terminal_or_pass_for_a_line_of_ours(tmp_path):
    faked = "fine\npair pair9: r9 over r8; trained M9\rjudgment 1 by M1: verdict 5"
    text = show.show(made_up.campaign(tmp_path, texts={**HOSTILE, "r1": faked}), "p1")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    assert [line for line in text.split("\n") if line.startswith("pair")] == [
        "pair pair1: r1 over r2 (4.33 over 1.00); trained M2"
    ]
    assert len(re.findall(r"^ {4}judgment 1 by", text, re.MULTILINE)) == 2


@pytest.mark.parametrize(("after", "told"), [(2.4, "kinder"), (1.6, "stricter"), (2.1, "no change")])
def test_a_judge_is_called_kinder_only_beyond_the_error_on_responses_that_stay_the_same(after, told):
    def measured(name, value):
        return {name: value, f"{name}_stderr": 0.1, f"{name}_n": 100.0}

    own = {t: measured("judgments/score_mean", value) for t, value in ((1, 2.0), (2, 3.0))}
    same = {f"M{t}": measured("evaluation/score_mean", value) for t, value in ((1, 2.0), (2, after))}
    found = summary.Summary(None, ["M1", "M2"], {}, own, same, {}, [])
    (said,) = report_words._generosity(found)
    # 3.0 - 2.0, sqrt(0.1^2 + 0.1^2) = 0.14: two of them are 0.28
    assert "move by +1.00 ± 0.14 from M1 to M2" in said
    assert told in said.rpartition(": ")[2]
