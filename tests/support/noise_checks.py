"""Two-sided tests of a standard deviation and of independence, for noise of any origin."""

import numpy as np
from numpy.typing import NDArray
from scipy import stats

FALSE_ALARM = 1e-6


def std_is(values: NDArray[np.float32], std: float) -> bool:
    """Whether chi-square takes `values` for N(0, std²); 1e5 of them show a std that is wrong by 1.1 %."""
    d = len(values)
    statistic = float(np.square(values.astype(np.float64) / std).sum())
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], d)
    return bool(low < statistic < high)


def assert_gaussian(values: NDArray[np.float32], std: float) -> None:
    """The right std passes and 2/3 and 3/2 of it fail; mean and shape are those of a Gaussian."""
    d = len(values)
    assert std_is(values, std)
    assert not std_is(values, std * 2 / 3)
    assert not std_is(values, std * 3 / 2)
    if d >= 100_000:
        assert not std_is(values, std * 1.022)  # twice the 1.1 % that is just caught
        assert not std_is(values, std / 1.022)
    assert abs(values.mean(dtype=np.float64)) < 5 * std / np.sqrt(d)  # 5 standard errors
    assert stats.kstest(values.astype(np.float64) / std, "norm").pvalue > FALSE_ALARM


def assert_uncorrelated(a: NDArray[np.float32], b: NDArray[np.float32]) -> None:
    """Correlation within 5 standard errors of 0."""
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(len(a))
