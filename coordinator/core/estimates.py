"""How fast a job is on a GPU type that it has not met: mean and variance of the log of its rate.

Problem: a schedule needs the speed of every job on every type, and measures a job on one or two.
Peak figures are wrong by a factor of two and more, since each job has a bottleneck of its own; a
table that is filled by running everything everywhere costs more than it saves. What is left are
three sources of different worth, and an answer is right only if it weighs them: public facts about
types, other jobs of this fleet on both types, and minutes of the job itself.

They meet in one linear model with normal errors, of the log of steps a second of job j on n GPUs of
type t. `prior_log` is what facts say, and everything below is by how much it is wrong:

    log rate = prior_log + a_j + (g_t + s_t * log2 n) + (u_j * l_t + v_j * log2 n) + e_jtn

- a_j: the job's level. Flat where nobody knows how much work a step is (then only ratios are known
  beforehand, and a change of the unit changes nothing), else as wide as facts are wrong.
- g_t, s_t: by how much the facts are wrong of this type, and of how it scales, for all jobs.
- u_j, v_j: what is special about the job: how much faster types are faster for it than for others,
  and how it scales. l_t begins as the log of the type's relative speed and is learned: this is
  completion of the table by rank two (as Quasar and Gavel complete theirs), of which the
  log-additive model is the part without u and v.
- e: what is special about this job on this type; it has no other name.

Jobs of one family (a model and a method) have a part of a, u, v and e in common.

`learn` fits types to what other jobs did, by expectation and conditional maximisation: given types,
each job's a, u, v follow in closed form, and given jobs, each type's g, s, l. All priors are
proper, so one observation moves things by what one is worth, and none by nothing. A fixed number of
rounds, sorted input: a replay learns the same. `estimate` then conditions exactly on what the job
itself and its family did, so each of their measurements can only narrow what is said.

The constants are standard deviations of logs: 0.1 is ten percent. They were chosen, and made wide
enough for the band to hold, on Gavel's `simulation_throughputs`; `bench/estimates.py` reports on
its `physical_cluster_throughputs` as well.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from coordinator.core.matrices import Matrix, Vector, dot, solve_many

OBSERVATIONS_MAX = 256  # that are learned from, the newest; some 50 ms of a core
KIN_MAX = 64  # places of a family that one estimate looks at; the work grows with their cube
ROUNDS = 12  # of learning; the last ones change the third digit

LEVEL_DEVIATION_FLAT = 100.0  # a factor of e^100: nothing is known, and the numbers stay sound
LEVEL_DEVIATION_WORK = 0.35  # where the work of a step is known: what share of the peak is reached
LEVEL_DEVIATION_FAMILY = 0.35  # of that, what all jobs of a family have in common
TYPE_DEVIATION = 0.3  # g of a type whose facts are known
TYPE_DEVIATION_UNKNOWN = 1.5  # and of one without facts
SCALING_DEVIATION = 0.1  # s, each time that the number of GPUs doubles
LOADING_DEVIATION = 0.1  # l about the log of the type's relative speed
SLOPE_DEVIATION = 0.15  # u within a family
SLOPE_DEVIATION_FAMILY = 0.3
JOB_SCALING_DEVIATION = 0.1  # v within a family
JOB_SCALING_DEVIATION_FAMILY = 0.16
CELL_DEVIATION = 0.12  # e of one job
CELL_DEVIATION_FAMILY = 0.16  # and what its family has of it in common

# A measurement of a minute wobbles by some percent (warm-up, evaluations, neighbours), one of hours
# still by two.
MEASURED_VARIANCE_MIN = 0.02**2
MEASURED_VARIANCE_SECOND = 0.3

BAND_DEVIATIONS = 1.2816  # eight of ten lie within
VARIANCE_MIN = 1e-6

FAMILY_VARIANCES = (
    LEVEL_DEVIATION_FAMILY**2, SLOPE_DEVIATION_FAMILY**2, JOB_SCALING_DEVIATION_FAMILY**2
)  # fmt: skip
SLOPE_VARIANCE = SLOPE_DEVIATION**2 + SLOPE_DEVIATION_FAMILY**2
CELL_VARIANCE = CELL_DEVIATION**2 + CELL_DEVIATION_FAMILY**2


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """On what a job runs: `gpus` of one type, all of its ranks' together."""

    gpu_type: str
    gpus: int


@dataclass(frozen=True, slots=True, order=True)
class Prior:
    """What facts say of a job at a place: `log_rate`, up to a constant of the job's unless
    `work_known`; `speed_log` is the type's relative speed; not `known`: there are no facts."""

    log_rate: float
    speed_log: float = 0.0
    known: bool = True
    work_known: bool = False


@dataclass(frozen=True, slots=True)
class Measurement:
    """`steps_per_s` over `seconds` of training; both are above zero."""

    place: Place
    prior: Prior
    steps_per_s: float
    seconds: float

    @property
    def variance(self) -> float:
        return MEASURED_VARIANCE_MIN + MEASURED_VARIANCE_SECOND / self.seconds

    @property
    def surprise(self) -> float:
        """By how much it differs from what facts say."""
        return math.log(self.steps_per_s) - self.prior.log_rate


@dataclass(frozen=True, slots=True)
class Observation:
    """A measurement, and whose it was."""

    job: str
    measurement: Measurement


@dataclass(frozen=True, slots=True)
class Effect:
    """Of a type (g, s, l) or a job (a, u, v): mean and covariance."""

    mean: Vector
    covariance: Matrix


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What `learn` has made of other jobs. `completes`: with u and v."""

    types: Mapping[str, Effect] = field(default_factory=dict)
    completes: bool = True


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of the log of steps a second."""

    mean: float
    variance: float

    @property
    def steps_per_s(self) -> float:
        """The median."""
        return math.exp(self.mean)

    @property
    def band(self) -> tuple[float, float]:
        """Within which it lies eight times of ten."""
        width = BAND_DEVIATIONS * math.sqrt(self.variance)
        return math.exp(self.mean - width), math.exp(self.mean + width)


NOTHING = Knowledge()

# --- one job --------------------------------------------------------------------------------------


def estimate(
    knowledge: Knowledge, kin: Iterable[Observation], job: str, place: Place, prior: Prior
) -> Estimate | None:
    """The job at `place`, given `kin`: what it did itself and what others of its family did.

    `None` where there is nothing to go by: the work of a step is not known and the job was never
    measured, or there are neither facts about the type nor a measurement of anything on it.
    """
    seen = _newest(_merged(kin), job)
    if not prior.work_known and all(other.job != job for other in seen):
        return None
    met = any(other.measurement.place.gpu_type == place.gpu_type for other in seen)
    if not prior.known and not met and place.gpu_type not in knowledge.types:
        return None
    here = _Cell(knowledge, job, place, prior)
    mean = prior.log_rate + here.mean
    variance = here.covariance(here)
    if not seen:
        return Estimate(mean, variance)
    cells = [_Cell(knowledge, o.job, o.measurement.place, o.measurement.prior) for o in seen]
    between = [[one.covariance(other) for other in cells] for one in cells]
    for index, observation in enumerate(seen):
        between[index][index] += observation.measurement.variance
    to_here = [cell.covariance(here) for cell in cells]
    rest = [o.measurement.surprise - cell.mean for o, cell in zip(seen, cells, strict=True)]
    by_rest, by_cell = solve_many(between, [rest, to_here])
    variance -= dot(to_here, by_cell)
    # Zero or less only by rounding: something is always left.
    return Estimate(mean + dot(to_here, by_rest), max(variance, VARIANCE_MIN))


class _Cell:
    """A job at a place, as the model sees it: `features` are of the job's (a, u, v), `doubled` of
    the type's (g, s), `mean` is what the type is known to add to facts."""

    def __init__(self, knowledge: Knowledge, job: str, place: Place, prior: Prior) -> None:
        self.job = job
        self.place = place
        self.work_known = prior.work_known
        self.effect = knowledge.types.get(place.gpu_type) or _type_prior(prior)
        doublings = math.log2(place.gpus)
        self.features = _features(knowledge, self.effect, doublings)
        self.doubled = [1.0, doublings]
        self.mean = dot(self.doubled, self.effect.mean[:2])

    def covariance(self, other: "_Cell") -> float:
        """With another cell of its family; what is common to what both are made of."""
        found = _diagonal_form(self.features, FAMILY_VARIANCES, other.features)
        if self.job == other.job:
            found += _diagonal_form(self.features, _within(self.work_known), other.features)
        if self.place.gpu_type == other.place.gpu_type:
            found += _form(self.doubled, self.effect.covariance, other.doubled)
            if self.features[1]:
                found += SLOPE_VARIANCE * self.effect.covariance[2][2]
        if self.place == other.place:
            found += CELL_DEVIATION_FAMILY**2
            found += CELL_DEVIATION**2 if self.job == other.job else 0.0
        return found


def _features(knowledge: Knowledge, effect: Effect, doublings: float) -> Vector:
    return [1.0, effect.mean[2], doublings] if knowledge.completes else [1.0, 0.0, 0.0]


def _merged(seen: Iterable[Observation]) -> list[Observation]:
    """One for each job, place and prior, by their precision; in an order that does not depend on
    theirs."""
    groups: dict[tuple[str, Place, Prior], list[Measurement]] = {}
    for one in seen:
        key = (one.job, one.measurement.place, one.measurement.prior)
        groups.setdefault(key, []).append(one.measurement)
    merged = []
    for (job, place, prior), group in sorted(groups.items(), key=lambda pair: pair[0]):
        seconds = math.fsum(m.seconds for m in group)
        log = math.fsum(math.log(m.steps_per_s) * m.seconds for m in group) / seconds
        merged.append(Observation(job, Measurement(place, prior, math.exp(log), seconds)))
    return merged


def _newest(seen: list[Observation], job: str) -> list[Observation]:
    """At most `KIN_MAX`, the job's own first, then those that were measured longest."""
    if len(seen) <= KIN_MAX:
        return seen
    by_worth = sorted(seen, key=lambda o: (o.job != job, -o.measurement.seconds, o.job))
    return by_worth[:KIN_MAX]


def _type_prior(prior: Prior) -> Effect:
    deviation = TYPE_DEVIATION if prior.known else TYPE_DEVIATION_UNKNOWN
    variances = (deviation**2, SCALING_DEVIATION**2, LOADING_DEVIATION**2)
    return Effect([0.0, 0.0, prior.speed_log], _diagonal(variances))


def _within(work_known: bool) -> Sequence[float]:
    """Variances of a job's (a, u, v) about its family's."""
    level = LEVEL_DEVIATION_WORK if work_known else LEVEL_DEVIATION_FLAT
    return (level**2, SLOPE_DEVIATION**2, JOB_SCALING_DEVIATION**2)


# --- the fleet ------------------------------------------------------------------------------------


def learn(observations: Sequence[Observation], *, completes: bool = True) -> Knowledge:
    """Types from what jobs did, the newest last, of which `OBSERVATIONS_MAX` count. The jobs that
    will be asked for are left out, or they count twice."""
    jobs: dict[str, list[Measurement]] = {}
    for one in _merged(observations[-OBSERVATIONS_MAX:]):
        jobs.setdefault(one.job, []).append(one.measurement)
    rows = list(jobs.values())
    knowledge = Knowledge(completes=completes)
    for _ in range(ROUNDS):
        told = [_told(knowledge, row) for row in rows]
        knowledge = Knowledge(_learn_types(knowledge, rows, told), completes)
    return knowledge


def _told(knowledge: Knowledge, row: Sequence[Measurement]) -> Effect:
    """A job's (a, u, v) given types and what it did."""
    own = _within(all(m.prior.work_known for m in row))
    precision = _diagonal(
        [1 / (one + common) for one, common in zip(own, FAMILY_VARIANCES, strict=True)]
    )
    pull = [0.0] * len(precision)
    for measurement in row:
        effect = _effect_of(knowledge, measurement)
        doublings = math.log2(measurement.place.gpus)
        rest = measurement.surprise - dot((1.0, doublings), effect.mean[:2])
        weight = 1 / (measurement.variance + CELL_VARIANCE)
        _add(precision, pull, _features(knowledge, effect, doublings), rest, weight)
    return _solved(precision, pull)


def _learn_types(
    knowledge: Knowledge, rows: Sequence[Sequence[Measurement]], told: Sequence[Effect]
) -> dict[str, Effect]:
    """Each type's (g, s, l) given jobs. A job's word counts for less the less is known of it; one
    with a single measurement and unknown work has said nothing of the type."""
    sums: dict[str, tuple[Matrix, Vector]] = {}
    # What all jobs have in common is the types', or rounds would only slowly move it there.
    common = [math.fsum(job.mean[i] for job in told) / max(1, len(told)) for i in range(3)]
    for row, job in zip(rows, told, strict=True):
        level, slope, scaling = job.mean[0], 0.0, 0.0
        if knowledge.completes:
            slope, scaling = job.mean[1] - common[1], job.mean[2] - common[2]
        for measurement in row:
            name = measurement.place.gpu_type
            if name not in sums:
                prior = _type_prior(measurement.prior)
                precision = _diagonal([1 / prior.covariance[i][i] for i in range(3)])
                sums[name] = precision, [prior.mean[i] * precision[i][i] for i in range(3)]
            doublings = math.log2(measurement.place.gpus)
            rest = measurement.surprise - level - scaling * doublings
            spread = job.covariance[0][0]
            weight = 1 / (measurement.variance + CELL_VARIANCE + spread)
            _add(*sums[name], [1.0, doublings, slope], rest, weight)
    return {name: _solved(*pair) for name, pair in sorted(sums.items())}


def _effect_of(knowledge: Knowledge, measurement: Measurement) -> Effect:
    return knowledge.types.get(measurement.place.gpu_type) or _type_prior(measurement.prior)


def _add(
    precision: Matrix, pull: Vector, features: Sequence[float], value: float, weight: float
) -> None:
    for row, one in enumerate(features):
        pull[row] += weight * one * value
        for column, other in enumerate(features):
            precision[row][column] += weight * one * other


def _solved(precision: Matrix, pull: Vector) -> Effect:
    units = _diagonal([1.0] * len(pull))
    mean, *covariance = solve_many(precision, [pull, *units])
    return Effect(mean, covariance)


def _diagonal(values: Sequence[float]) -> Matrix:
    return [
        [value if row == column else 0.0 for column in range(len(values))]
        for row, value in enumerate(values)
    ]


def _diagonal_form(left: Vector, variances: Sequence[float], right: Vector) -> float:
    return sum(a * v * b for a, v, b in zip(left, variances, right, strict=True))


def _form(left: Vector, matrix: Matrix, right: Vector) -> float:
    """left * matrix * right, of the part of the matrix that both have."""
    return sum(
        one * matrix[row][column] * other
        for row, one in enumerate(left)
        for column, other in enumerate(right)
    )
