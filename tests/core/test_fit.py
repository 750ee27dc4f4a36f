"""What `baton fit` answers: counted by hand, and through the real core with its history.

Problem: an answer with a wrong unit looks like any other. So the numbers of a small model are
worked out here, the verdicts on memory are tried at their edges, and what is not known must say so.
"""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.core import workload
from coordinator.core.estimates import Place
from coordinator.core.fit import (
    Kind,
    MemoryEvidence,
    answer,
    corrected_ratio,
    fit,
    usable_bytes,
)
from coordinator.core.fit_requests import Fit, FitJob, Fitting
from coordinator.core.history import EXIT_OUT_OF_MEMORY, History, Run, TooLarge, names
from coordinator.core.messages import Refusal
from coordinator.core.model import GpuFacts, JobSpec
from coordinator.core.workload import ModelFacts, Training
from tests.core.coordinator_harness import Rig
from tests.core.training_fleet import Fleet
from trainers import start
from trainers.finetune import FinetuneOptions
from trainers.lora import LoraOptions

GIB = 1024**3
GPT2 = ModelFacts(
    parameters=124_439_808, layers=12, hidden=768, intermediate=3072, vocabulary=50_257
)
LLAMA_8B = ModelFacts(
    parameters=8_030_261_248, layers=32, hidden=4096, intermediate=14_336, vocabulary=128_256,
    gated=True, tied=False,
)  # fmt: skip
CONFIG = {"model": "m", "train_data": "t", "steps": 1000, "window_tokens": 1024}
H100 = Kind(GpuFacts("", "NVIDIA H100 80GB HBM3", 81_559 * 1024**2), 8)
A100 = Kind(GpuFacts("", "NVIDIA A100-SXM4-80GB", 80 * GIB), 4)
RTX4090 = Kind(GpuFacts("", "NVIDIA GeForce RTX 4090", 24_564 * 1024**2), 2)
ODD = Kind(GpuFacts("", "NVIDIA Jetson Orin", 8 * GIB), 1)


def spec(trainer: str = "finetune", **config: object) -> JobSpec:
    told = json.dumps({**CONFIG, **config})
    return JobSpec(trainer=trainer, trainer_config_json=told, gpus=1)


def one(
    asked: FitJob, kind: Kind, runs: tuple[Run, ...] = (), too_large: tuple[TooLarge, ...] = ()
) -> Fit:
    (found,) = fit(asked, [kind], History(runs, too_large)).fits
    return found


def test_the_trainers_defaults() -> None:
    """A coordinator cannot import them."""
    for trainer, kind in (("finetune", FinetuneOptions), ("lora", LoraOptions)):
        theirs = {field.name: field.default for field in dataclasses.fields(kind)}
        for field in dataclasses.fields(Training):
            if field.name in theirs and field.default is not dataclasses.MISSING:
                assert field.default == theirs[field.name], (trainer, field.name)


def test_how_a_trainer_ends_that_does_not_fit() -> None:
    assert start.EXIT_OUT_OF_MEMORY == EXIT_OUT_OF_MEMORY


def test_the_work_of_a_step() -> None:
    training = workload.read(spec(batch_size=8, accumulate=4, precision="bfloat16"))
    assert isinstance(training, Training)
    assert training.tokens == 32 * 1024
    done = workload.work(training, GPT2)
    # 6 for each parameter and token, and 12 * layers * hidden * window of the attention.
    assert done.flops == 32_768 * (6 * 124_439_808 + 12 * 12 * 768 * 1024)
    assert done.half
    assert done.launch_s == pytest.approx(0.005 + 4 * 12 * 0.0008)


def test_the_memory_of_a_step() -> None:
    training = workload.read(spec(batch_size=8))
    assert isinstance(training, Training)
    # 16 bytes for each parameter; for each token 12 layers of 17 * 768 float32, and its logits.
    held = 16 * 124_439_808
    moving = 8 * 1024 * (12 * 17 * 768 * 4 + 16 * 50_257)
    needed = workload.memory_bytes(training, GPT2, 1, 8)
    assert needed == pytest.approx(800e6 + 1.05 * (held + moving), rel=1e-6)
    assert workload.memory_bytes(training, GPT2, 4, 8) < needed


@pytest.mark.parametrize("trainer", ["finetune", "lora"])
@given(st.integers(1, 64), st.integers(1, 4096), st.booleans())
def test_more_of_anything_needs_more(
    trainer: str, batch_size: int, window: int, half: bool
) -> None:
    precision = "bfloat16" if half else "float32"
    training = workload.read(
        spec(trainer, batch_size=batch_size, window_tokens=window, precision=precision)
    )
    assert isinstance(training, Training)
    last = 0
    for at_once in (1, 2, 8, 32):
        needed = workload.memory_bytes(training, LLAMA_8B, 1, at_once)
        assert needed > last
        last = needed
    assert workload.work(training, LLAMA_8B).flops > 0


def test_what_fits_and_what_does_not() -> None:
    small = FitJob(spec(batch_size=8), GPT2)
    assert one(small, H100).fitting is Fitting.FITS
    large = one(FitJob(spec(batch_size=8), LLAMA_8B), H100)
    assert large.fitting is Fitting.DOES_NOT_FIT
    assert large.speed is None
    assert large.seconds is None
    assert large.memory_why.startswith("does not fit: ")
    adapters = spec("lora", batch_size=64, precision="bfloat16", base_precision="bfloat16")
    some = one(FitJob(adapters, LLAMA_8B), H100)
    assert some.fitting is Fitting.ACCUMULATES
    assert some.at_once is not None
    assert 1 <= some.at_once < 64
    assert some.memory_needed_bytes is not None
    assert some.memory_needed_bytes <= usable_bytes(H100.facts.memory_bytes)
    assert f"{some.at_once} of 64 samples at once" in some.memory_why


def test_dollars_and_time_follow_from_speed() -> None:
    asked = FitJob(spec(batch_size=8), GPT2, prices=(("H100", 2.0), ("NVIDIA", 9.0)))
    found = one(asked, H100)
    assert found.speed is not None
    assert found.usd_per_hour == 9.0, "the longest name that matches"
    assert found.tokens_per_step == 8 * 1024
    assert found.seconds == pytest.approx(1000 / found.speed.steps_per_s)
    tokens_per_s = found.speed.steps_per_s * 8 * 1024
    assert found.usd_per_million_tokens == pytest.approx(9.0 / 3600 * 1e6 / tokens_per_s)
    assert found.speed_why == "estimated from facts"


def test_ranks_are_paid_for() -> None:
    alone = one(FitJob(spec(batch_size=8), GPT2), H100)
    four = one(FitJob(dataclasses.replace(spec(batch_size=8), ranks=4), GPT2), H100)
    assert four.gpus_job == 4
    assert four.usd_per_hour == 4 * (alone.usd_per_hour or 0)
    assert four.speed is not None
    assert alone.speed is not None
    assert 1 < four.speed.steps_per_s / alone.speed.steps_per_s < 4


def test_a_small_model_is_no_faster_on_a_faster_gpu() -> None:
    small = FitJob(spec(batch_size=1, window_tokens=16), GPT2)
    fast, slow = one(small, H100).speed, one(small, RTX4090).speed
    assert fast is not None
    assert slow is not None
    assert fast.steps_per_s == slow.steps_per_s == pytest.approx(1 / (0.005 + 12 * 0.0008))


def test_what_is_not_known_says_so() -> None:
    command = one(FitJob(JobSpec(command=("python", "t.py"), gpus=1)), H100)
    assert command.fitting is Fitting.UNKNOWN
    assert command.speed is None
    assert command.seconds is None
    assert command.usd_per_million_tokens is None
    assert command.memory_why == "unknown: a command does not say how much work a step is"
    assert command.speed_why.endswith("no job like it has run in this project yet")
    folder = one(FitJob(spec(), None, "model 'm' is no folder here"), H100)
    assert folder.memory_why == "unknown: model 'm' is no folder here"
    odd = one(FitJob(spec(batch_size=1, window_tokens=128), GPT2), ODD)
    assert odd.speed is None
    assert odd.speed_why == "unknown: no facts about NVIDIA Jetson Orin, and nothing has run on it"
    assert odd.usd_per_hour is None
    assert odd.fitting is Fitting.FITS, "its memory is known all the same"


def test_what_the_job_does_not_ask_for() -> None:
    picky = dataclasses.replace(spec(), gpu_types=("A100", "H200"))
    assert one(FitJob(picky, GPT2), H100).unsuited == "the job asks for A100 or H200"
    assert one(FitJob(picky, GPT2), A100).unsuited == ""
    closed = Kind(A100.facts, 0)
    assert one(FitJob(picky, GPT2), closed).unsuited == "none of them takes work at present"


def ran(job: JobSpec, kind: Kind, rate: float, seconds: float = 3600) -> Run:
    family, name = names(job)
    key = {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA A100-SXM4-80GB": "A100 80GB"}
    place = Place(key.get(kind.facts.name, kind.facts.name), 1)
    return Run(family, name, job, place, kind.facts.memory_bytes, rate, seconds)


def test_what_has_run_is_believed() -> None:
    job = spec(batch_size=8)
    found = one(FitJob(job, GPT2), H100, (ran(job, H100, 12.5, 36_000),))
    assert found.speed is not None
    assert found.speed.steps_per_s == pytest.approx(12.5, rel=0.01)
    assert found.speed.high / found.speed.low < 1.15
    assert found.speed_why == "measured: 1 run of this job there"
    elsewhere = one(FitJob(job, GPT2), A100, (ran(job, H100, 12.5, 36_000),))
    assert elsewhere.speed is not None
    assert elsewhere.speed.steps_per_s < 12.5
    assert elsewhere.speed_why == "estimated from 1 run of this job elsewhere and facts"


def test_a_command_that_has_run_is_known_where_it_ran_and_elsewhere() -> None:
    job = JobSpec(command=("python", "t.py"), gpus=1)
    runs = (ran(job, H100, 3.0, 36_000),)
    there, elsewhere = one(FitJob(job), H100, runs), one(FitJob(job), A100, runs)
    assert there.speed is not None
    assert elsewhere.speed is not None
    assert there.speed.steps_per_s == pytest.approx(3.0, rel=0.01)
    assert 0.2 < elsewhere.speed.steps_per_s / 3.0 < 0.9
    other = dataclasses.replace(job, project="another")
    assert one(FitJob(other), H100, runs).speed is None


def test_another_batch_size_counts_as_of_its_kind() -> None:
    half = half_of_the_usual_rate()
    found = one(FitJob(spec(batch_size=8), GPT2), H100, (ran(spec(batch_size=16), H100, half),))
    by_facts = one(FitJob(spec(batch_size=8), GPT2), H100)
    assert found.speed is not None
    assert by_facts.speed is not None
    assert found.speed.steps_per_s < 0.85 * by_facts.speed.steps_per_s
    assert found.speed.high / found.speed.low < by_facts.speed.high / by_facts.speed.low
    assert found.speed_why == "estimated from 1 run of its kind and facts"


def half_of_the_usual_rate() -> float:
    """Of twice the batch, half of what facts say."""
    usual = one(FitJob(spec(batch_size=16), GPT2), H100).speed
    assert usual is not None
    return usual.steps_per_s / 2


def test_what_made_steps_there_did_fit_there() -> None:
    job = spec(batch_size=8)
    before = one(FitJob(job, LLAMA_8B), H100)
    assert before.fitting is Fitting.DOES_NOT_FIT
    after = one(FitJob(job, LLAMA_8B), H100, (ran(job, H100, 0.1),))
    assert after.fitting in (Fitting.FITS, Fitting.ACCUMULATES)
    assert after.speed is not None


def test_what_was_out_of_memory_there_does_not_fit_there_again() -> None:
    job = spec(batch_size=1, window_tokens=128)
    assert one(FitJob(job, GPT2), RTX4090).fitting is Fitting.FITS
    family, _ = names(job)
    failed = TooLarge(family, job, RTX4090.facts.memory_bytes)
    after = one(FitJob(job, GPT2), RTX4090, (), (failed,))
    assert after.fitting is not Fitting.FITS
    assert one(FitJob(job, GPT2), H100, (), (failed,)).fitting is Fitting.FITS
    other = dataclasses.replace(failed, family="another model")
    assert one(FitJob(job, GPT2), RTX4090, (), (other,)).fitting is Fitting.FITS


EVIDENCE = st.builds(
    MemoryEvidence, st.integers(1, 10**12), st.integers(1, 10**12), fitted=st.booleans()
)


@given(st.lists(EVIDENCE), st.randoms(use_true_random=False))
def test_a_correction_agrees_with_what_was_seen(
    evidence: list[MemoryEvidence], chance: object
) -> None:
    ratio = corrected_ratio(evidence)
    assert ratio > 0
    for seen in evidence:
        if not seen.fitted:
            assert seen.predicted_bytes * ratio >= seen.usable_bytes * (1 - 1e-9)
    if all(seen.fitted for seen in evidence):
        for seen in evidence:
            assert seen.predicted_bytes * ratio <= seen.usable_bytes * (1 + 1e-9)
    mixed = list(evidence)
    chance.shuffle(mixed)  # type: ignore[attr-defined]
    assert corrected_ratio(mixed) == ratio


def test_no_evidence_no_correction() -> None:
    assert corrected_ratio([]) == 1
    assert corrected_ratio([MemoryEvidence(100, 200, fitted=True)]) == 1
    assert corrected_ratio([MemoryEvidence(100, 150, fitted=False)]) == pytest.approx(1.575)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"steps": 0}, "'steps' of the trainer's configuration must be from 1 to 1000000000"),
        (
            {"batch_size": "many"},
            "'batch_size' of the trainer's configuration must be a whole number",
        ),
        ({"model": 3}, "'model' of the trainer's configuration must be text"),
    ],
)
def test_a_configuration_that_says_nothing(changed: dict[str, Any], why: str) -> None:
    assert workload.read(spec(**changed)) == why


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 60_000, "is no JSON"),
        ('{"model": "m", "steps": 1' + "0" * 400 + "}", "'steps' of the trainer's configuration"),
        ('{"model": "m", "steps": 10, "batch_size": true}', "must be a whole number"),
        ('{"model": "m", "steps": 1000000000, "batch_size": 1000000000}', "more than 1e+15 tokens"),
    ],
)
def test_a_configuration_that_would_break_arithmetic(text: str, why: str) -> None:
    """Anybody may ask, and the answer is the coordinator's."""
    said = workload.read(JobSpec(trainer="finetune", trainer_config_json=text))
    assert isinstance(said, str)
    assert why in said


def test_a_job_without_gpus_is_refused() -> None:
    rig = Rig()
    said = answer(rig.core.state, rig.now, FitJob(dataclasses.replace(spec(), gpus=0)))
    assert isinstance(said, Refusal)
    assert "no GPU" in said.sentence


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ('{"steps": "five"}', "'steps' must be a whole number of at least 1, not 'five'"),
        ('{"batchsize": 64}', "unknown key 'batchsize'; did you mean 'batch_size'?"),
        ('{"batch_size": 64, "zzz": 1}', "unknown key 'zzz'; known keys: steps, "),
    ],
)
def test_a_misspelt_key_is_refused(config: str, sentence: str) -> None:
    rig = Rig()
    asked = dataclasses.replace(spec(), trainer_config_json=config)
    said = answer(rig.core.state, rig.now, FitJob(asked))
    assert isinstance(said, Refusal)
    assert sentence in said.sentence


@pytest.mark.parametrize(
    ("gpus", "ranks", "sentence"),
    [
        (5, 1, "asks for 5 GPUs on one node (gpus = 5), and the most that any node has is 4"),
        (2, 4, "asks for 4 ranks of 2 GPUs each, and the whole fleet has places for 3"),
        (4, 1, ""),
        (2, 3, ""),
    ],
)
def test_more_gpus_than_there_are_are_refused(gpus: int, ranks: int, sentence: str) -> None:
    fleet = Fleet("4xA100:80", "2xH100")
    asked = dataclasses.replace(spec(), gpus=gpus, ranks=ranks)
    said = answer(fleet.state, fleet.rig.now, FitJob(asked))
    assert isinstance(said, Refusal) == bool(sentence)
    assert not isinstance(said, Refusal) or sentence in said.sentence
