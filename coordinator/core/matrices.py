"""Linear equations of a few unknowns, for the estimates; a core has the standard library alone.

Symmetric positive definite ones, by Cholesky's method: it needs no pivots, and a matrix that is not
positive definite is a bug of ours and raises.

"""

import math
from collections.abc import Sequence

Vector = list[float]
Matrix = list[list[float]]


def dot(left: Sequence[float], right: Sequence[float]) -> float:
    """Their inner product; both have the same length."""
    return sum(one * other for one, other in zip(left, right, strict=True))


def solve_many(matrix: Matrix, rights: Sequence[Vector]) -> Matrix:
    """x with matrix * x = right for each right side, with one factorisation. Raises ValueError for
    a matrix that is not positive definite."""
    lower = _factor(matrix)
    return [_substitute(lower, right) for right in rights]


def _factor(matrix: Matrix) -> Matrix:
    size = len(matrix)
    lower = [[0.0] * size for _ in range(size)]
    for row in range(size):
        for column in range(row + 1):
            rest = matrix[row][column] - dot(lower[row][:column], lower[column][:column])
            if row == column:
                if not rest > 0:
                    raise ValueError("the matrix is not positive definite")
                lower[row][row] = math.sqrt(rest)
            else:
                lower[row][column] = rest / lower[column][column]
    return lower


def _substitute(lower: Matrix, right: Vector) -> Vector:
    size = len(lower)
    forward = [0.0] * size
    for row in range(size):
        forward[row] = (right[row] - dot(lower[row][:row], forward[:row])) / lower[row][row]
    solved = [0.0] * size
    for row in reversed(range(size)):
        later = sum(lower[k][row] * solved[k] for k in range(row + 1, size))
        solved[row] = (forward[row] - later) / lower[row][row]
    return solved
