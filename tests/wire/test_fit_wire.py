"""Questions and answers of `baton fit` on the wire: what is not known is absent, and what cannot be
is refused with a sentence."""

import math
from typing import Any

import pytest

from coordinator import wire, wire_fit
from coordinator.core.fit_requests import Fit, FitPage, Fitting, Speed
from coordinator.core.workload import ModelFacts
from protos.baton.v1 import jobs_pb2 as pb
from protos.baton.v1 import types_pb2

DIMENSIONS: dict[str, Any] = {
    "parameters": 5,
    "layers": 1,
    "hidden": 2,
    "intermediate": 8,
    "vocabulary": 10,
}
SPEC = types_pb2.JobSpec(trainer="lora", gpus=1)


def test_a_question_arrives() -> None:
    request = pb.FitJobRequest(
        spec=SPEC,
        model=pb.ModelFacts(**DIMENSIONS, gated=True),
        usd_per_gpu_hour={"H100": 2.5, "A100": 0},
    )
    asked = wire_fit.decode(request)
    assert asked.model == ModelFacts(**DIMENSIONS, gated=True, tied=False)
    assert asked.prices == (("A100", 0), ("H100", 2.5))
    assert (asked.spec.trainer, asked.spec.project) == ("lora", "default")
    unknown = wire_fit.decode(pb.FitJobRequest(spec=SPEC, model_why="no folder"))
    assert (unknown.model, unknown.model_why) == (None, "no folder")


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (pb.FitJobRequest(usd_per_gpu_hour={"H100": -1}), "no price an hour for 'H100'"),
        (pb.FitJobRequest(usd_per_gpu_hour={"H100": math.inf}), "no price an hour for 'H100'"),
        (pb.FitJobRequest(usd_per_gpu_hour={"": 1}), "no price an hour for ''"),
        (pb.FitJobRequest(usd_per_gpu_hour={str(n): 1 for n in range(65)}), "at most 64"),
        (pb.FitJobRequest(model=pb.ModelFacts()), "parameters of the model is 0"),
        (
            pb.FitJobRequest(model=pb.ModelFacts(**{**DIMENSIONS, "layers": 10**16})),
            "layers of the model is 10000000000000000",
        ),
    ],
)
def test_what_cannot_be_is_refused(request_: pb.FitJobRequest, sentence: str) -> None:
    with pytest.raises(wire.WireError, match=sentence):
        wire_fit.decode(request_)


def test_what_is_not_known_is_absent_and_what_is_known_is_there() -> None:
    unknown = Fit("H100", 80, 1, 1, None, "why", Fitting.UNKNOWN, "why not")
    known = Fit(
        "H100", 80, 1, 1, Speed(2.0, 1.0, 4.0), "", Fitting.ACCUMULATES, "", 70, 4, 512, 0.0, 0.0,
        9.5,
    )  # fmt: skip
    first, second = wire_fit.encode(FitPage((unknown, known), "source")).fits
    for field in ("speed", "memory_needed_bytes", "usd_per_hour", "duration_seconds"):
        assert not first.HasField(field)
        assert second.HasField(field)
    assert first.fitting == pb.FITTING_UNSPECIFIED
    assert second.fitting == pb.FITTING_ACCUMULATES
    assert (second.usd_per_hour, second.speed.steps_per_second_high) == (0.0, 4.0)
