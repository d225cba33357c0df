import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srlm_core.similarity import Similarity, rouge_l


def test_rouge_l_by_hand():
    # "the cat sat on the mat" against "the cat lay on a mat": LCS the cat on mat = 4 of 6 and 6, F = 8/12
    assert rouge_l("The cat sat on the mat", "the cat lay on a mat.") == pytest.approx(8 / 12)
    assert rouge_l("", "") == 0


TEXTS = st.one_of(
    st.text(alphabet="ab ", min_size=1, max_size=24),
    st.lists(
        st.sampled_from(["a", "the", "red", "blue", "cat", "dog", "mat", "hat", "sat", "ran"]), min_size=1, max_size=12
    ).map(" ".join),
)


@settings(max_examples=400)
@given(st.lists(TEXTS, min_size=1, max_size=12), TEXTS, st.sampled_from([0.3, 0.5, 0.6, 0.7, 0.95, 1.0]))
def test_the_bounds_of_the_filter_never_change_its_decision(kept, new, threshold):
    similarity = Similarity(threshold)
    for place, text in enumerate(kept):
        similarity.add(text, str(place))
    alike = [place for place, text in enumerate(kept) if rouge_l(text, new) > threshold + 1e-9]
    assert similarity.nearest(new) == (str(alike[0]) if alike else None)


@given(st.lists(TEXTS, max_size=6), st.lists(TEXTS, max_size=6), TEXTS)
def test_what_is_forgotten_was_never_there(before, after, new):
    similarity, short = Similarity(0.5), Similarity(0.5)
    for text in before:
        similarity.add(text, text)
        short.add(text, text)
    for text in after:
        similarity.add(text, "after")
    similarity.forget(len(before))
    assert len(similarity) == len(before)
    assert similarity.nearest(new) == short.nearest(new)
