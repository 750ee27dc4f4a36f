"""Questions and answers of `baton fit` on the wire.

Problem: what is not known must arrive as not known. A number that is `None` is absent in the
message, and a model without dimensions comes with the sentence why.

"""

import math
from typing import Final

from coordinator import wire
from coordinator.core.fit_requests import Fit, FitJob, FitPage, Fitting
from coordinator.core.workload import ModelFacts
from protos.baton.v1 import jobs_pb2 as pb

PRICES_MAX: Final = 64  # types of GPU in one fleet; far above real use
DIMENSION_MAX: Final = 10**15  # a thousand times the largest model
WHY_CHARACTERS_MAX: Final = 1_000

_FITTINGS: Final = {
    Fitting.UNKNOWN: pb.FITTING_UNSPECIFIED,
    Fitting.FITS: pb.FITTING_FITS,
    Fitting.ACCUMULATES: pb.FITTING_ACCUMULATES,
    Fitting.DOES_NOT_FIT: pb.FITTING_DOES_NOT_FIT,
}


def decode(request: pb.FitJobRequest) -> FitJob:
    """Raises `WireError`."""
    prices = tuple(sorted(request.usd_per_gpu_hour.items()))
    if len(prices) > PRICES_MAX:
        raise wire.WireError(f"{len(prices)} prices; at most {PRICES_MAX} are taken")
    for name, usd in prices:
        if not name or not math.isfinite(usd) or usd < 0:
            raise wire.WireError(f"{usd} is no price an hour for {name!r}")
    return FitJob(
        wire.decode_spec(request.spec),
        _model(request.model) if request.HasField("model") else None,
        request.model_why[:WHY_CHARACTERS_MAX],
        prices,
    )


def _model(told: pb.ModelFacts) -> ModelFacts:
    dimensions = {
        name: getattr(told, name)
        for name in ("parameters", "layers", "hidden", "intermediate", "vocabulary")
    }
    for name, value in dimensions.items():
        if not 1 <= value <= DIMENSION_MAX:
            raise wire.WireError(f"{name} of the model is {value}; it is 1 to {DIMENSION_MAX}")
    return ModelFacts(**dimensions, gated=told.gated, tied=told.tied)


def encode(page: FitPage) -> pb.FitJobResponse:
    return pb.FitJobResponse(
        fits=[_fit(fit) for fit in page.fits], prices_source=page.prices_source
    )


def _fit(fit: Fit) -> pb.Fit:
    speed = None
    if fit.speed is not None:
        speed = pb.FitSpeed(
            steps_per_second=fit.speed.steps_per_s,
            steps_per_second_low=fit.speed.low,
            steps_per_second_high=fit.speed.high,
        )
    return pb.Fit(
        gpu_type=fit.gpu_type,
        memory_bytes=fit.memory_bytes,
        gpus=fit.gpus,
        gpus_of_job=fit.gpus_job,
        speed=speed,
        speed_why=fit.speed_why,
        fitting=_FITTINGS[fit.fitting],
        memory_why=fit.memory_why,
        memory_needed_bytes=fit.memory_needed_bytes,
        samples_at_once=fit.at_once,
        tokens_per_step=fit.tokens_per_step,
        usd_per_hour=fit.usd_per_hour,
        usd_per_million_tokens=fit.usd_per_million_tokens,
        duration_seconds=fit.seconds,
        unsuited=fit.unsuited,
    )
