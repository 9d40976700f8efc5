"""The little statistics that the findings need: bands over seeds, and tests paired by seed."""

from itertools import product

import numpy as np

# Two-sided 95% quantiles of Student's t for 1, 2, 3, ... degrees of freedom
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)


def mean_interval(values: list[float]) -> tuple[float, float, float]:
    """The mean and its 95% interval by Student's t, for 2 to 13 values."""
    count = len(values)
    middle = float(np.mean(values))
    error = float(np.std(values, ddof=1)) / count**0.5
    half = T_95[count - 2] * error
    return middle, middle - half, middle + half


def sign_flip_test(differences: list[float]) -> float:
    """Two-sided p of the hypothesis that differences paired by seed are as likely below 0 as above.

    Exact: all 2^n ways to flip signs are tried. p is the share of them whose sum is at least as
    far from 0 as the one that was seen, so it cannot be below 2 / 2^n.
    """
    values = np.array(differences)
    signs = np.array(list(product((-1, 1), repeat=len(values))))  # (2^n, n)
    sums = np.abs(signs @ values)
    seen = abs(values.sum())
    return float(np.mean(sums >= seen - 1e-9 * (1 + seen)))  # with room for rounding


def paired(values: list[float], base: list[float]) -> dict[str, float]:
    """The mean of values - base with its interval and p; both have one number a seed."""
    differences = [value - other for value, other in zip(values, base, strict=True)]
    middle, low, high = mean_interval(differences)
    p = sign_flip_test(differences)
    return {"difference": middle, "low": low, "high": high, "p": p}


def pooled_mean(totals: list[float], counts: list[float], window: int) -> list[float | None]:
    """A mean for each step, over the steps at most `window` away, weighted by count.

    totals[i] is the sum of counts[i] values. None where there is no value at all.
    """
    means: list[float | None] = []
    for step in range(len(totals)):
        near = slice(max(0, step - window), step + window + 1)
        count = sum(counts[near])
        means.append(sum(totals[near]) / count if count else None)
    return means


def band(curves: list[list[float | None]]) -> tuple[list[float], list[float], list[float]]:
    """For each step the mean over seeds, and the mean minus and plus one standard deviation.

    A seed without a value at a step is left out there.
    """
    middle, low, high = [], [], []
    for step in zip(*curves, strict=True):
        values = [value for value in step if value is not None]
        mean, spread = float(np.mean(values)), float(np.std(values))
        middle.append(mean)
        low.append(mean - spread)
        high.append(mean + spread)
    return middle, low, high
