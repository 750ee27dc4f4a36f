"""What docs/trainers.md shows is what works: its programs are run, its files are read.

A document rots unseen. So the blocks are taken out of it and used: the plain PyTorch program
trains, is stopped, and goes on exactly; the configurations are built with the trainers' own
classes; and the promise of how few lines it takes is counted.
"""

import contextlib
import itertools
import os
import re
import runpy
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import baton_sdk
from tests.held_port import HOST, held_port
from tests.trainers.fake_agent import FakeAgent
from trainers import configuration
from trainers.finetune import FinetuneOptions
from trainers.lora import LoraOptions
from trainers.transfer import TransferOptions

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "trainers.md"
BLOCK = re.compile(r"^```(python|toml)\n# (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = {name: text for _, name, text in BLOCK.findall(DOCUMENT.read_text("utf-8"))}
LINES_MAX = 5
STEPS = 300
SEVERAL_STEPS = 1000
RANKS_S_MAX = 200


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAgent]:
    made = FakeAgent(tmp_path / "socket", stores=True)
    monkeypatch.setenv("BATON_SOCKET", str(made.path))
    monkeypatch.setenv("BATON_TOKEN", made.token)
    made.start()
    yield made
    made.stop()


def run_plain(directory: Path) -> dict[str, Any]:
    """The plain program, in this process, with this directory to stage in; what it leaves in its
    namespace."""
    directory.mkdir()
    program = directory / "plain.py"
    program.write_text(BLOCKS[program.name], "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BATON_STAGING_DIR", str(directory))
        namespace = runpy.run_path(str(program))
    namespace["session"].close()
    return namespace


def weights(namespace: dict[str, Any]) -> object:
    return namespace["model"].weight.tolist()


def steps(found: list[dict[str, Any]]) -> list[int]:
    return [message["step"] for message in found]


@pytest.mark.parametrize("name", ["plain.py", "with_lightning.py"])
def test_it_takes_no_more_lines_than_promised(name: str) -> None:
    text = BLOCKS[name]
    numbers = re.findall(r"  # (\d)$", text, re.MULTILINE)
    assert numbers == [str(number + 1) for number in range(len(numbers))]
    assert len(numbers) <= LINES_MAX
    # What bears no number is the script as it was: nothing of Baton's is left without the others.
    statements = re.split(r"\n(?=\S)", text)
    plain = [part for part in statements if "  # " not in part]
    assert not [part for part in plain if "baton" in part or "session" in part]


def test_the_plain_program_goes_on_exactly_after_a_stop(
    agent: FakeAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = weights(run_plain(tmp_path / "undisturbed"))
    assert steps(agent.checkpoints(300)) == [100, 200, 300]
    after_step = baton_sdk.Session.after_step

    def stopped(session: baton_sdk.Session, step: int, *arguments: Any, **keywords: Any) -> None:
        if step == 150:
            os.kill(os.getpid(), signal.SIGTERM)
        after_step(session, step, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(baton_sdk.Session, "after_step", stopped)
        with pytest.raises(SystemExit) as left:
            run_plain(tmp_path / "first")
    assert left.value.code == baton_sdk.EXIT_RUN_AGAIN
    saved = agent.checkpoints(150)
    assert steps(saved) == [100, 150]
    monkeypatch.setenv("BATON_RESTORE_DIR", saved[-1]["path"])
    monkeypatch.setenv("BATON_RESTORE_STEP", "150")
    again = run_plain(tmp_path / "second")
    assert steps(agent.checkpoints(300)) == [200, 300]
    assert weights(again) == undisturbed


def test_the_plain_program_runs_outside_baton(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(BLOCKS["plain.py"], "utf-8")
    assert runpy.run_path(str(tmp_path / "plain.py"))["step"] == STEPS


def test_the_addressed_order_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    (tmp_path / "addressed.py").write_text(BLOCKS["addressed.py"], "utf-8")
    loader = runpy.run_path(str(tmp_path / "addressed.py"))["loader"]
    alone = [batch.tolist() for batch in itertools.islice(loader(0, 0, 1), 3)]
    assert len(alone[0]) == 32
    assert alone[0] != alone[1]
    later = [next(iter(loader(2, rank, 2))).tolist() for rank in range(2)]
    assert [value for part in later for value in part] == alone[2]


def run_several(agents: list[FakeAgent], directory: Path, restored: str = "") -> list[int]:
    """The program of several ranks, as processes of their own; unless there is something to resume
    from, the second is asked to stop before there is a first, without which it takes no step."""
    directory.mkdir()
    (directory / "several.py").write_text(BLOCKS["several.py"], "utf-8")
    with held_port() as port, contextlib.ExitStack() as running:
        second = running.enter_context(rank_process(1, agents, directory, port, restored))
        if not restored:
            agents[1].expect("hello")
            agents[1].send(type="stop", reason="preempted", grace_ms=600_000)
        first = running.enter_context(rank_process(0, agents, directory, port, restored))
        return [process.wait(RANKS_S_MAX) for process in (first, second)]


@contextlib.contextmanager
def rank_process(
    rank: int, agents: list[FakeAgent], directory: Path, port: int, restored: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Killed in the end, if need be."""
    staging = directory / f"staging-{rank}"
    staging.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": str(DOCUMENT.parents[1] / "trainers" / "sdk"),
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(len(agents)),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
        "BATON_SOCKET": str(agents[rank].path),
        "BATON_TOKEN": agents[rank].token,
        "BATON_STAGING_DIR": str(staging),
        "BATON_RESTORE_DIR": restored,
    }
    command = [sys.executable, str(directory / "several.py")]
    with subprocess.Popen(command, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def test_the_program_of_several_ranks_stops_and_goes_on_together(tmp_path: Path) -> None:
    agents = [FakeAgent(tmp_path / f"socket-{rank}", stores=True) for rank in range(2)]
    for agent in agents:
        agent.start()
    assert run_several(agents, tmp_path / "first") == [baton_sdk.EXIT_RUN_AGAIN] * 2
    stopped = agents[0].expect("checkpoint")
    assert 0 < stopped["step"] < SEVERAL_STEPS
    assert run_several(agents, tmp_path / "second", stopped["path"]) == [0, 0]
    assert steps(agents[0].checkpoints(SEVERAL_STEPS))[-1] == SEVERAL_STEPS
    assert not [message for message in agents[1].rest() if message["type"] == "checkpoint"]
    for agent in agents:
        agent.stop()


def test_the_lightning_program_is_python() -> None:
    compile(BLOCKS["with_lightning.py"], "with_lightning.py", "exec")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("transfer.toml", TransferOptions),
        ("finetune.toml", FinetuneOptions),
        ("lora.toml", LoraOptions),
    ],
)
def test_the_configurations_are_right(name: str, kind: type[configuration.LoopOptions]) -> None:
    options = configuration.build(kind, tomllib.loads(BLOCKS[name]), source=name)
    assert options.problems() == []


def test_every_block_is_looked_at() -> None:
    used = {"plain.py", "addressed.py", "with_lightning.py", "several.py"}
    used |= {"transfer.toml", "finetune.toml", "lora.toml"}
    assert set(BLOCKS) == used


def run_readme(directory: Path, total_steps: int) -> list[int]:
    """The program of the README, in this process: the steps that it has made and saved."""
    text = (DOCUMENT.parents[1] / "README.md").read_text("utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    saved: list[int] = []

    def save(folder: Path) -> None:
        saved.append(int(folder.name.rpartition("-")[2]))
        (folder / "state").write_text("any", "utf-8")

    trained: list[int] = []

    def train() -> float:
        trained.append(1)
        return 0.5

    path = directory / "readme.py"
    path.write_text(program, "utf-8")
    names = {
        "load": lambda folder: None,
        "save": save,
        "train": train,
        "total_steps": total_steps,
    }
    left = runpy.run_path(str(path), init_globals=names)
    left["session"].close()
    return [len(trained), *saved]


def test_the_program_of_the_readme_runs_outside_baton(tmp_path: Path) -> None:
    assert run_readme(tmp_path, 600) == [600]


@pytest.mark.usefixtures("agent")
def test_the_program_of_the_readme_saves_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_STAGING_DIR", str(tmp_path))
    assert run_readme(tmp_path, 600) == [600, 500]
    monkeypatch.setenv("BATON_RESTORE_DIR", str(tmp_path))
    monkeypatch.setenv("BATON_RESTORE_STEP", "500")
    assert run_readme(tmp_path, 600) == [100]
