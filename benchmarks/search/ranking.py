"""Rank correlation between the accuracies of the same candidates on two sets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 1000  # of the bootstrap
LEVEL = 0.95
FEWEST = 5  # that are called the best: a correlation of fewer says nothing
_SEED = 0


def ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks of values [N] from 1, smallest first; equal values share the mean of their ranks."""
    return _ranks(_codes(values))


def _codes(values: np.ndarray) -> np.ndarray:
    """Return int64 [N] that rise with the values and are equal where these are."""
    return np.unique(values, return_inverse=True)[1]


def _ranks(codes: np.ndarray) -> np.ndarray:
    counts = np.bincount(codes)
    return (np.cumsum(counts) - (counts - 1) / 2)[codes]


def spearman(one: np.ndarray, other: np.ndarray) -> float | None:
    """Return Spearman's rank correlation of two series [N]; None if one is constant or they are shorter than 2."""
    return _spearman(_codes(one), _codes(other))


def _spearman(one: np.ndarray, other: np.ndarray) -> float | None:
    first, second = (_ranks(codes) - (len(codes) + 1) / 2 for codes in (one, other))
    scale = np.sqrt((first**2).sum() * (second**2).sum())
    return float((first * second).sum() / scale) if scale else None


def interval(series: Sequence[np.ndarray], reference: np.ndarray) -> tuple[float, float] | None:
    """Return the percentile bootstrap interval, at ``LEVEL``, of the mean `spearman` of several series with one.

    Args:
        series: [N] each, such as one per seed.
        reference: [N]. The same pairs are drawn for all series.

    Returns:
        Lower and upper end; None where no correlation has a value.
    """
    generator = np.random.default_rng(_SEED)
    coded, whole, found = [_codes(one) for one in series], _codes(reference), []
    for rows in generator.integers(0, len(whole), (RESAMPLES, len(whole))):
        known = [rho for one in coded if (rho := _spearman(one[rows], whole[rows])) is not None]
        if known:
            found.append(sum(known) / len(known))
    if not found:
        return None
    low, high = np.quantile(found, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)


def best(values: np.ndarray, share: float) -> np.ndarray:
    """Return the indices of the best ``share`` of values [N], at least ``FEWEST``; the first of equal ones."""
    return np.argsort(-values, kind="stable")[: max(FEWEST, round(share * len(values)))]
