"""length_control: how often an answer would win if it were as long as the other one.

A logistic fit of the verdicts with the difference in length as a feature, asked at length 0 (Dubois et al.,
arXiv:2404.04475, section 3).
"""

import warnings

import numpy as np

SAMPLES = 100
"""Bootstrap samples behind the error of a length-controlled rate."""
UNBOUNDED = 15.0
"""A coefficient beyond it is a fit that found none: a step of one feature would change the odds three million times."""


def length_controlled(
    won: np.ndarray, longer: np.ndarray, hard: np.ndarray, *, samples: int = SAMPLES, seed: int = 0
) -> tuple[float | None, float | None]:
    """Return the share that would be won at equal length, and its error by resampling; null where there is none.

    `won` [n] in [0, 1]; `longer` [n]: characters more than the other answer has, NaN = not known; `hard` [n]: how
    difficult each instruction is, standardised, or zeros.
    """
    if not len(won) or not np.isfinite(longer).all():
        return None, None
    spread = longer.std()
    features = np.column_stack([np.tanh(longer / spread) if spread else np.zeros(len(longer)), hard])
    level = at_equal_length(features, won)
    if level is None:
        return None, None
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(0, len(won), len(won)) for _ in range(samples))
    again = [found for sample in drawn if (found := at_equal_length(features[sample], won[sample])) is not None]
    # an error over the samples that have a solution would leave out the widest ones
    return level, float(np.std(again)) if samples and len(again) == samples else None


def at_equal_length(features: np.ndarray, won: np.ndarray) -> float | None:
    """Fit P(win) = sigmoid(theta + phi * length + psi * difficulty) and return its mean at length 0.

    `features` [n, 2]: tanh of the standardised length difference, and the difficulty. `won` [n] in [0, 1]. Null where
    length or difficulty tell wins from losses without an error: then no finite phi or psi fits best.
    """
    from sklearn.linear_model import LogisticRegression

    if won.min() == won.max() in (0, 1):
        return float(won.mean())  # it won or lost everything: no length explains that
    fit = LogisticRegression(C=1e9, solver="newton-cholesky", tol=1e-9, max_iter=1000)
    # A verdict of 0.7 is a win of weight 0.7 and a loss of weight 0.3
    both, outcome = np.vstack([features, features]), np.repeat([1, 0], len(won))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns of is seen by its result
        fit.fit(both, outcome, sample_weight=np.concatenate([won, 1 - won]))
    if not np.isfinite(fit.coef_).all() or np.abs(fit.coef_).max() > UNBOUNDED:
        return None
    level = features.copy()
    level[:, 0] = 0
    return float(fit.predict_proba(level)[:, 1].mean())
