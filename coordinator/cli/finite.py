"""A number on the command line that has to be one.

Problem: `nan` and `inf` are floats, and `nan` is within every range, as no comparison refuses it;
money computed from either looks like money. So numbers that people give are finite, or refused.
"""

import math
from typing import Any

import click


class Finite(click.FloatRange):
    """As `click.FloatRange`, and neither infinite nor not a number."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


PRICE = Finite(min=0, min_open=True)
"""Of what is worth deciding about; what costs nothing is not."""
