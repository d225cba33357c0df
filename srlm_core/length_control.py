"""length_control: how often an answer would win if it were as long as the other one.

A logistic fit of the verdicts with the difference in length as a feature, asked at length 0 (Dubois et al.,
arXiv:2404.04475, section 3).
"""

import warnings

import numpy as np

UNBOUNDED = 15.0
"""A coefficient beyond it is a fit that found none: a step of one feature would change the odds three million times."""


def length_controlled(won: np.ndarray, longer: np.ndarray, hard: np.ndarray) -> tuple[float | None, float | None]:
    """Return the share that would be won at equal length, and its standard error; null where there is none.

    `won` [n] in [0, 1]; `longer` [n]: characters more than the other answer has, NaN = not known; `hard` [n]: how
    difficult each instruction is, standardised, or zeros.
    """
    if not len(won) or not np.isfinite(longer).all():
        return None, None
    spread = longer.std()
    return at_equal_length(np.column_stack([np.tanh(longer / spread) if spread else np.zeros(len(longer)), hard]), won)


def at_equal_length(features: np.ndarray, won: np.ndarray) -> tuple[float | None, float | None]:
    """Fit P(win) = sigmoid(theta + phi * length + psi * difficulty); return its mean at length 0 and that one's error.

    `features` [n, 2]: tanh of the standardised length difference, and the difficulty. `won` [n] in [0, 1]. Null where
    length or difficulty tell wins from losses without an error: then no finite phi or psi fits best.
    """
    from sklearn.linear_model import LogisticRegression

    if won.min() == won.max() in (0, 1):
        return float(won.mean()), 0.0  # it won or lost everything: no length explains that
    fit = LogisticRegression(C=1e9, solver="newton-cholesky", tol=1e-9, max_iter=1000)
    # A verdict of 0.7 is a win of weight 0.7 and a loss of weight 0.3
    both, outcome = np.vstack([features, features]), np.repeat([1, 0], len(won))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns of is seen by its result
        fit.fit(both, outcome, sample_weight=np.concatenate([won, 1 - won]))
    if not np.isfinite(fit.coef_).all() or np.abs(fit.coef_).max() > UNBOUNDED:
        return None, None
    level = features.copy()
    level[:, 0] = 0
    expected, at_level = (fit.predict_proba(rows)[:, 1] for rows in (features, level))
    return float(at_level.mean()), _error(features, level, won, expected, at_level)


def _error(
    features: np.ndarray, level: np.ndarray, won: np.ndarray, expected: np.ndarray, at_level: np.ndarray
) -> float:
    """Return the error of the mean at length 0 by each row's influence on it (the sandwich of an M-estimator)."""
    x, x_level = (np.column_stack([np.ones(len(rows)), rows]) for rows in (features, level))
    information = x.T @ (x * (expected * (1 - expected))[:, None]) / len(won)
    gradient = (x_level * (at_level * (1 - at_level))[:, None]).mean(axis=0)
    # a pseudo-inverse: a feature that is the same in all rows explains nothing
    influence = at_level - at_level.mean() + (x * (won - expected)[:, None]) @ np.linalg.pinv(information) @ gradient
    return float(np.sqrt((influence**2).mean() / len(won)))
