"""What the fleet has seen of speeds, from the attempts that the real core keeps, and its answers.

Problem: history that is kept beside the jobs goes out of step with them. It is a function of the
state here, so a coordinator that was restarted from its records has to answer as before, and a
replay has to answer the same.
"""

import dataclasses
import json

import pytest

from coordinator.core import history
from coordinator.core import messages as m
from coordinator.core.fit_requests import FitJob, FitPage
from coordinator.core.model import HostFacts, JobSpec, Progress, TrainerTime
from coordinator.core.workload import ModelFacts
from tests.core.coordinator_harness import GIGABYTE, UNIX_MS_AT_START, Rig, gpus_of

GPT2 = ModelFacts(
    parameters=124_439_808, layers=12, hidden=768, intermediate=3072, vocabulary=50_257
)
CONFIG = json.dumps(
    {"model": "gpt2", "train_data": "d", "steps": 1000, "window_tokens": 512, "batch_size": 8}
)
SPEC = JobSpec(
    trainer="finetune", trainer_config_json=CONFIG, gpus=1, gpu_types=("H100",),
    working_directory="/data",
)  # fmt: skip


def ask(rig: Rig, body: m.RequestBody) -> m.Answer:
    for effect in rig.handle(m.Request(1, body)):
        if isinstance(effect, m.Reply):
            return effect.answer
    raise AssertionError("no answer")


def fits(rig: Rig, spec: JobSpec) -> FitPage:
    answer = ask(rig, FitJob(spec, GPT2))
    assert isinstance(answer, FitPage)
    return answer


def rig_with_fleet() -> Rig:
    rig = Rig()
    for session, (node, gpus) in enumerate(
        (("n1", "2xNVIDIA H100 80GB HBM3"), ("n2", "1xNVIDIA A100-SXM4-80GB")), start=1
    ):
        host = HostFacts(cpu_count=1, memory_bytes=64 * GIGABYTE)
        said = m.Hello(node, f"journal-{node}", "", host, gpus_of(node, gpus), ())
        rig.handle(m.FromAgent(session, said))
    return rig


def run(rig: Rig, attempt: str, *, step: int, step_s: float) -> None:
    """It starts on n1, and trains."""
    unix_ms = UNIX_MS_AT_START + rig.now_ms
    started = m.AgentEvent(1, unix_ms, attempt, m.AttemptStarted(7, start_ms=0))
    rig.handle(m.FromAgent(1, started))
    rig.now_ms += round(step_s * 1000)
    held = (m.HeldAttempt(attempt, ("n1-g0",)),)
    told = ((attempt, Progress(step, 1000, time=TrainerTime(step_s=step_s))),)
    rig.handle(m.FromAgent(1, m.Heartbeat(1, None, (), held, told)))


def test_before_anything_is_submitted_facts_answer() -> None:
    rig = rig_with_fleet()
    page = fits(rig, SPEC)
    assert [(fit.gpu_type, fit.gpus) for fit in page.fits] == [
        ("NVIDIA A100-SXM4-80GB", 1), ("NVIDIA H100 80GB HBM3", 2),
    ]  # fmt: skip
    assert all(fit.speed_why == "estimated from facts" for fit in page.fits)
    assert page.fits[0].unsuited == "the job asks for H100"


def test_a_run_is_seen_while_it_runs_and_after_a_restart() -> None:
    rig = rig_with_fleet()
    ask(rig, m.Submit(SPEC))
    run(rig, "1.1", step=200, step_s=100)
    (seen,) = history.seen(rig.core.state, rig.now).runs
    assert seen.steps_per_s == pytest.approx(2.0)
    assert seen.seconds == pytest.approx(100)
    assert (seen.place.gpu_type, seen.place.gpus) == ("H100", 1)
    _, h100 = fits(rig, SPEC).fits
    assert h100.speed is not None
    assert h100.speed.steps_per_s == pytest.approx(2.0, rel=0.05)
    assert h100.speed_why == "measured: 1 run of this job there"
    for before, after in rig.replayed():
        assert before == after

    ended = m.AgentEvent(2, UNIX_MS_AT_START + rig.now_ms, "1.1", m.AttemptExited(0))
    rig.handle(m.FromAgent(1, ended))
    rig.restart()
    _, again = fits(rig, SPEC).fits
    assert again.speed is not None
    assert again.speed.steps_per_s == pytest.approx(h100.speed.steps_per_s, rel=1e-6)
    assert again.gpus == 0, "no node has said hello yet"
    assert again.unsuited == "none of them takes work at present"


def test_a_few_steps_are_no_speed() -> None:
    rig = rig_with_fleet()
    ask(rig, m.Submit(SPEC))
    run(rig, "1.1", step=history.STEPS_MIN - 1, step_s=100)
    assert history.seen(rig.core.state, rig.now) == history.History()


@pytest.mark.parametrize(("status", "said"), [(12, None), (1, 12)])
def test_a_training_that_was_out_of_memory_is_remembered(status: int, said: int | None) -> None:
    """Also below a launcher, whose own status is 1."""
    rig = rig_with_fleet()
    ask(rig, m.Submit(SPEC))
    run(rig, "1.1", step=0, step_s=1)
    body = m.AttemptExited(status, said_exit_code=said)
    ended = m.AgentEvent(2, UNIX_MS_AT_START + rig.now_ms, "1.1", body)
    rig.handle(m.FromAgent(1, ended))
    rig.restart()
    (failed,) = history.seen(rig.core.state, rig.now).too_large
    assert failed.gpu_memory_bytes == 80 * GIGABYTE
    _, h100 = fits(rig, SPEC).fits
    assert h100.memory_why.startswith("does not fit: "), h100.memory_why
    assert h100.speed is None


def test_the_same_training_is_the_same_job_and_a_larger_batch_is_of_its_kind() -> None:
    other = json.dumps({**json.loads(CONFIG), "batch_size": 32, "learning_rate": 1.0})
    faster = json.dumps({**json.loads(CONFIG), "learning_rate": 1.0, "steps": 7})
    family, name = history.names(SPEC)
    assert history.names(dataclasses.replace(SPEC, trainer_config_json=faster)) == (family, name)
    kin = history.names(dataclasses.replace(SPEC, trainer_config_json=other))
    assert kin[0] == family
    assert kin[1] != name
    elsewhere = dataclasses.replace(SPEC, project="another")
    assert history.names(elsewhere)[0] != family


def test_only_a_job_that_is_wrong_as_such_is_refused() -> None:
    rig = rig_with_fleet()
    both = dataclasses.replace(SPEC, command=("true",))
    refused = ask(rig, FitJob(both))
    assert isinstance(refused, m.Refusal)
    assert "not both" in refused.sentence
    never = dataclasses.replace(SPEC, gpu_types=("B200",))
    assert all(fit.unsuited == "the job asks for B200" for fit in fits(rig, never).fits)
    assert not rig.core.state.jobs


def test_jobs_that_wait_hide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "JOBS_MAX", 2)
    rig = rig_with_fleet()
    ask(rig, m.Submit(SPEC))
    run(rig, "1.1", step=200, step_s=300)
    before = history.seen(rig.core.state, rig.now).runs
    assert before
    for _ in range(5):
        ask(rig, m.Submit(dataclasses.replace(SPEC, hold=True)))
    assert history.seen(rig.core.state, rig.now).runs == before
