"""Quantiles as arrays: which ones are forecast, how wrong they were, and those of weighted samples.

Problem: whoever sizes a fleet needs to know how large demand may become, not only how large it is
expected to be. A forecast is therefore the same few quantiles everywhere, and it is judged by the
pinball loss, which the true quantile makes smallest (Koenker and Bassett, Regression Quantiles,
Econometrica 46, 1978).
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# The outermost are a band of 95 percent; with them come those of 90, 80 and 50, and the median.
LEVELS: Final[Floats] = np.array([0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.975])
# The same of the standard normal distribution.
NORMAL: Final[Floats] = np.array([-1.96, -1.645, -1.282, -0.674, 0.0, 0.674, 1.282, 1.645, 1.96])


def pinball(actual: float, forecast: Floats) -> Floats:
    """The loss of each quantile; shape as `forecast`, whose last axis is that of `LEVELS`."""
    above = actual - forecast
    return np.maximum(LEVELS * above, (LEVELS - 1.0) * above)


def of_samples(samples: Floats, weights: Floats) -> Floats:
    """The quantiles of a sample whose members count differently; at least one member."""
    order = np.argsort(samples, kind="stable")
    heaped = np.cumsum(weights[order]) - 0.5 * weights[order]
    return np.interp(LEVELS, heaped / weights.sum(), samples[order])
