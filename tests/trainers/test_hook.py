"""The import hook and the bridge to Hugging Face's Trainer, without a cluster.

What the hook does to a program is looked at in child processes with a stand-in for transformers, so
that each costs milliseconds; the bridge with the real Trainer and a tiny model in this process,
against an agent that the test plays. Which checkpoint is resumed from: `test_hook_files.py`.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import baton_hook
import baton_sdk
from agent.core.attempt import AttemptRecord
from agent.core.launch import LaunchOptions, compose
from agent.core.messages import JobSpec
from baton_hook import guard, resume, torn
from baton_hook import trainer as bridge
from baton_sdk.session import STOP_SIGNALS
from tests.trainers.fake_agent import FakeAgent, until

PATH_ENTRY = Path(baton_hook.__file__).parent / "path"
STEPS, EVERY = 8, 2

# --- a program -----------------------------------------------------------------------------------

PROGRAM = """\
import sys
import json
print(json.dumps({
    "modules": sorted(sys.modules),
    "path": sys.path,
    "site": getattr(sys.modules.get("sitecustomize"), "__file__", None),
}))
"""
STAND_IN = """\
class Trainer:
    def train(self, resume_from_checkpoint=None):
        return "trained"
"""


def run_program(text: str, tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """As the agent starts one: with our directory on the path."""
    environment = {
        "PATH": os.environ["PATH"],
        "BATON_SOCKET": str(tmp_path / "socket"),
        "PYTHONPATH": f"{PATH_ENTRY}:{tmp_path}",
        **variables,
    }
    return subprocess.run(
        [sys.executable, "-c", text], env=environment, cwd=tmp_path, timeout=60,
        check=True, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A package called transformers."""
    package = tmp_path / "transformers"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "trainer.py").write_text(STAND_IN)
    return package


def test_a_program_without_transformers_is_as_it_was(tmp_path: Path) -> None:
    with_us = json.loads(run_program(PROGRAM, tmp_path).stdout)
    without = json.loads(run_program(PROGRAM, tmp_path, PYTHONPATH=str(tmp_path)).stdout)
    assert with_us["path"] == without["path"]
    extra = set(with_us["modules"]) - set(without["modules"])
    assert {name.partition(".")[0] for name in extra} <= {"sitecustomize", "importlib", "warnings"}
    assert not {"transformers", "torch", "baton_hook", "baton_sdk"} & set(with_us["modules"])


def test_a_sitecustomize_of_the_environment_still_runs(tmp_path: Path) -> None:
    own = tmp_path / "sitecustomize.py"
    own.write_text("import sys\nsys.stderr.write('own\\n')\n")
    done = run_program(PROGRAM, tmp_path)
    assert done.stderr == "own\n"
    assert json.loads(done.stdout)["site"] == str(own)
    # Its errors are as they would be without us: Python's own remark, and the program runs.
    own.write_text("raise RuntimeError('own')\n")
    done = run_program(PROGRAM, tmp_path)
    expected = run_program(PROGRAM, tmp_path, PYTHONPATH=str(tmp_path))
    assert done.stderr == expected.stderr
    assert "RuntimeError: own" in done.stderr


USE = "from transformers import trainer; print(trainer.Trainer.train.__module__)"
SHOW = f"{USE}\nprint(hasattr(trainer.Trainer.train, '__wrapped__'), trainer.__loader__)"


def test_trainer_is_followed_unless_switched_off(tmp_path: Path, stand_in: Path) -> None:
    assert "True" in run_program(SHOW, tmp_path).stdout
    assert "SourceFileLoader" in run_program(SHOW, tmp_path).stdout
    assert "False" in run_program(SHOW, tmp_path, BATON_HOOK="0").stdout
    assert "False" in run_program(SHOW, tmp_path, BATON_SOCKET="").stdout


def test_the_sdk_is_there_even_where_it_is_not_installed(tmp_path: Path) -> None:
    # -S: no site-packages, so neither the project nor its installation; but also no sitecustomize,
    # which is what is imported here by hand.
    text = "import sitecustomize, baton_sdk; print(baton_sdk.__file__)"
    environment = {"PYTHONPATH": str(PATH_ENTRY), "BATON_HOOK": "0"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", text], env=environment, cwd=tmp_path, timeout=60,
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == baton_sdk.__file__


def test_a_failure_of_ours_is_one_line_and_the_program_goes_on(
    tmp_path: Path, stand_in: Path
) -> None:
    (stand_in / "trainer.py").write_text("strange = 1")
    done = run_program("from transformers import trainer; print(trainer.strange)", tmp_path)
    assert done.stdout == "1\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith("baton_hook: Trainer is not followed: AttributeError: ")
    # A Trainer from nowhere: train is wrapped, and nothing that the bridge needs is there.
    (stand_in / "trainer.py").write_text(STAND_IN)
    text = "from transformers.trainer import Trainer; print(Trainer().train())"
    done = run_program(text, tmp_path)
    assert done.stdout == "trained\n"
    assert done.stderr.startswith("baton_hook: ")
    assert "Traceback" not in done.stderr


def test_the_agent_puts_it_before_what_a_job_has_on_its_path() -> None:
    options = LaunchOptions("n1", "/s", "/a", "/python", (("PYTHONPATH", "/own"),), "/hook")

    def path(spec: JobSpec) -> str:
        record = AttemptRecord("1.1", 1, 1, spec, (), (), None, False, 0, token="t")
        return dict(compose(record, options).environment)["PYTHONPATH"]

    assert path(JobSpec(command=("python", "x.py"))) == "/hook:/own"
    job_s_own = (("PYTHONPATH", "/job"),)
    assert path(JobSpec(command=("python", "x.py"), environment=job_s_own)) == "/hook:/job"
    # A built-in trainer talks to the agent itself.
    assert path(JobSpec(trainer="finetune")) == "/own"


def test_an_error_of_the_program_stays_its_own(tmp_path: Path, stand_in: Path) -> None:
    (stand_in / "trainer.py").write_text("raise ImportError('no accelerate')")
    text = "try:\n import transformers.trainer\nexcept ImportError as e: print(e)"
    done = run_program(text, tmp_path)
    assert (done.stdout, done.stderr) == ("no accelerate\n", "")


# --- the real Trainer ----------------------------------------------------------------------------


class Room:
    """A directory, an agent, and what a job's environment says."""

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.patch = patch
        self.agent = FakeAgent(directory / "socket", stores=True)
        self.attempts_count = 0
        patch.setenv("BATON_SOCKET", str(self.agent.path))
        patch.setenv("BATON_TOKEN", self.agent.token)
        patch.setenv("BATON_GRACE_MS", "20000")
        self.agent.start()

    def attempt(self, restored: str = "") -> None:
        """A new process, as far as the bridge can tell, which finds this checkpoint."""
        self.end()
        self.patch.setattr(bridge, "_program", bridge.Program())
        self.attempts_count += 1
        staging = self.directory / f"staging-{self.attempts_count}"
        staging.mkdir()
        self.patch.setenv("BATON_STAGING_DIR", str(staging))
        if restored:
            self.patch.setenv("BATON_RESTORE_DIR", restored)

    def end(self) -> None:
        """What the end of a process does: the connection is gone, and the signal handlers."""
        if bridge._program.session is not None:
            bridge._program.session.close()
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    def all(self) -> list[dict[str, Any]]:
        """What this process has said, up to its end."""
        self.end()
        until(lambda: not self.agent.connected, "the agent has read to the end")
        return self.agent.rest()


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Room]:
    from transformers import trainer as module

    monkeypatch.setattr(guard, "_said", set())
    monkeypatch.setattr(module.Trainer, "train", module.Trainer.train)  # to be given back
    made = Room(tmp_path, monkeypatch)
    bridge.install(module)
    made.attempt()
    yield made
    made.end()
    made.agent.stop()


def make_trainer(output: Path, *, stop_at: int = 0, **arguments: Any) -> Any:
    """A linear model with dropout on eight numbers, and a SIGTERM at a step."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            y = torch.nn.functional.dropout(self.layer(x), 0.5, self.training)
            return {"loss": ((y - labels) ** 2).mean(), "logits": y}

    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if stop_at and state.global_step == stop_at - 1:
                os.kill(os.getpid(), signal.SIGTERM)

    torch.manual_seed(7)
    data = [{"x": torch.randn(4), "labels": torch.randn(4)} for _ in range(12)]
    settings = {
        "output_dir": str(output), "max_steps": STEPS, "save_steps": EVERY, "logging_steps": 1,
        "per_device_train_batch_size": 2, "learning_rate": 0.1, "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "seed": 7, **arguments,
    }  # fmt: skip
    return Trainer(
        Model(), TrainingArguments(**settings), train_dataset=data, eval_dataset=data,
        callbacks=[Stop()],
    )  # fmt: skip


def weights(trainer: Any) -> dict[str, list[float]]:
    return {name: tensor.tolist() for name, tensor in trainer.model.state_dict().items()}


def steps(found: list[dict[str, Any]]) -> list[int]:
    return [message["step"] for message in found]


def losses(trainer: Any) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in trainer.state.log_history if "loss" in line}


def test_progress_and_every_save_reach_the_agent(room: Room) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    trainer = make_trainer(room.directory / "output")
    result = trainer.train()
    assert result.global_step == STEPS
    assert signal.getsignal(signal.SIGTERM) is handler
    messages = room.all()
    saved = [message for message in messages if message["type"] == "checkpoint"]
    assert [message["step"] for message in saved] == [2, 4, 6, 8]
    names = {path.name for path in Path(saved[-1]["path"]).iterdir()}
    assert {"model.safetensors", "optimizer.pt", torn.STATE_NAME, resume.MARK_NAME} <= names
    last = [message for message in messages if message["type"] == "progress"][-1]
    assert (last["step"], last["total_steps"]) == (STEPS, STEPS)
    assert last["metrics"]["loss"] == pytest.approx(losses(trainer)[STEPS], abs=1e-6)
    milestones = [message["name"] for message in messages if message["type"] == "milestone"]
    assert milestones == ["load", "first_step"]


def test_a_stopped_training_goes_on_elsewhere_as_if_nothing_had_happened(
    room: Room, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed = make_trainer(room.directory / "undisturbed")
    undisturbed.train()
    room.agent.checkpoints(STEPS)
    room.attempt()
    with pytest.raises(SystemExit) as left:
        make_trainer(room.directory / "first", stop_at=5).train()
    assert left.value.code == baton_sdk.EXIT_RUN_AGAIN
    assert "stopped after step 5, with its checkpoint: run me again" in capsys.readouterr().err
    saved = room.agent.checkpoints(5)
    assert steps(saved) == [2, 4, 5]
    room.attempt(saved[-1]["path"])
    # The script asks for the newest in its output directory, of which there is none here.
    again = make_trainer(room.directory / "second")
    again.train(resume_from_checkpoint=True)
    assert steps(room.agent.checkpoints(STEPS)) == [6, 8]
    assert weights(again) == weights(undisturbed)
    assert losses(again) == losses(undisturbed)


def test_a_save_ahead_of_a_stop_is_one_checkpoint_more(room: Room) -> None:
    """Asked for in a step whose checkpoint is not due; the training goes on."""
    trainer = make_trainer(room.directory / "output")

    def asked(_args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step == 2:
            room.agent.send(type="save", reason="n1 is being drained")
            session = bridge._program.session
            assert session is not None
            until(lambda: session._save_requested, "no request")

    trainer.callback_handler.callbacks[-1].on_step_begin = asked
    assert trainer.train().global_step == STEPS
    assert steps(room.agent.checkpoints(STEPS)) == [2, 3, 4, 6, 8]


def test_a_stop_at_the_last_step_lets_the_script_end(room: Room) -> None:
    trainer = make_trainer(room.directory / "output", stop_at=STEPS)
    assert trainer.train().global_step == STEPS


def test_the_best_model_comes_along(room: Room) -> None:
    best: dict[str, Any] = {
        "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True,
        "metric_for_best_model": "loss", "greater_is_better": True,  # the first ones are worst
    }  # fmt: skip
    undisturbed = make_trainer(room.directory / "undisturbed", **best)
    undisturbed.train()
    best_step = undisturbed.state.best_global_step
    assert best_step < STEPS
    room.agent.checkpoints(STEPS)
    room.attempt()
    stop_at = best_step + 3
    with pytest.raises(SystemExit):
        make_trainer(room.directory / "output", stop_at=stop_at, **best).train()
    saved = room.agent.checkpoints(stop_at)[-1]["path"]
    # Another node: the same path, with nothing in it.
    (room.directory / "output").rename(room.directory / "gone")
    room.attempt(saved)
    again = make_trainer(room.directory / "output", **best)
    again.train()
    assert again.state.best_global_step == best_step
    assert weights(again) == weights(undisturbed)


def test_two_trainings_in_one_program_are_told_apart(room: Room) -> None:
    make_trainer(room.directory / "a").train()
    with pytest.raises(SystemExit):
        make_trainer(room.directory / "b", stop_at=3).train()
    saved = room.agent.checkpoints(STEPS + 3)
    assert steps(saved) == [2, 4, 6, 8, 10, 11]
    # The first training runs again and hands nothing over; the second resumes at its third step.
    room.attempt(saved[-1]["path"])
    first = make_trainer(room.directory / "c")
    first.train()
    assert len(losses(first)) == STEPS
    second = make_trainer(room.directory / "d")
    second.train()
    assert steps(room.agent.checkpoints(2 * STEPS)) == [12, 14, 16]


def test_a_script_that_talks_itself_is_left_alone(
    room: Room, capsys: pytest.CaptureFixture[str]
) -> None:
    with baton_sdk.connect():
        make_trainer(room.directory / "output").train()
    assert "talks to Baton itself" in capsys.readouterr().err
    assert not [message for message in room.all() if message["type"] == "checkpoint"]


def test_a_failing_bridge_costs_no_training(
    room: Room, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(resume, "link_tree", fail)
    assert make_trainer(room.directory / "output").train().global_step == STEPS
    said = [line for line in capsys.readouterr().err.splitlines() if "baton_hook" in line]
    assert said == [
        "baton_hook: handing over a checkpoint failed, the program goes on: OSError: the disk is"
        " full"
    ]
