"""Several ranks train what one rank trains, stop together, and go on with any number of them.

Real processes over loopback (``gang``). One rank is the oracle of several, to rounding; a gang that
was not interrupted is the oracle of one that was, to the bit, where the world is the same.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from agent import slabs as agent_slabs
from tests.trainers import tasks
from tests.trainers.fake_agent import FakeAgent
from tests.trainers.forking import Ended
from tests.trainers.gang import Host
from trainers import checkpoint, export, microbatch, ranges, ranks, weights
from trainers.ranks import (
    ALONE,
    NO_STOP_S,
    PROTOCOL,
    Decision,
    RankError,
    Vote,
    World,
    decide,
    world_of,
)

pytestmark = pytest.mark.xdist_group("ranks")
"""One set of uninterrupted runs."""

STEPS, SAVED = 8, 4
ROUNDING = 1e-5
PLENTY = 1 << 40
PLAIN: dict[str, Any] = {
    "steps": STEPS,
    "batch_size": 8,
    "log_every": 1,
    "evaluate_every": 3,
    "checkpoint_every_steps": SAVED,
    "checkpoint_every_s": 0,
    "learning_rate": 0.01,
    # Some of the gradients are longer (they are 0.33 to 0.65) and some are not: AdamW does not see
    # that all are too long by the same factor, but a limit does.
    "clip_norm": 0.4,
    "collective_timeout_s": 60.0,
}
RANDOM: dict[str, Any] = {**PLAIN, "dropout": 0.2, "noisy": True}


@pytest.fixture(scope="module")
def straight(host: Host) -> dict[int, tuple[list[Ended], Path]]:
    """Uninterrupted runs of one, two and three ranks, and where their checkpoints lie. Pieces of
    two: with three ranks the shards are 3, 3 and 2, and the last rank has a piece less."""
    runs = {}
    for size in (1, 2, 3):
        kept = host.folder / f"straight-{size}"
        chosen = {**PLAIN, "batch_size": 2, "accumulate": 4, "checkpoint_directory": str(kept)}
        ended = host.run(size, **chosen, output_directory=str(kept / "result"))
        assert [rank.status for rank in ended] == [0] * size, ended[-1].err
        runs[size] = (ended, kept)
    return runs


def only(kept: Path, step: int, target: Path) -> str:
    """A directory with this checkpoint alone, to resume from."""
    target.mkdir()
    shutil.copytree(kept / f"checkpoint-{step:09d}", target / f"checkpoint-{step:09d}")
    return str(target)


def parts(kept: Path, step: int) -> list[checkpoint.Snapshot]:
    directory = kept / f"checkpoint-{step:09d}"
    return [checkpoint.read(part) for part in sorted(directory.glob("rank-*"))]


def close(left: list[float], right: list[float]) -> bool:
    return left == pytest.approx(right, rel=ROUNDING)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left, right)


# --- what is decided, without a process -----------------------------------------------------------


def test_one_stop_stops_all_and_the_shortest_grace_counts() -> None:
    assert not decide([Vote(1.0), Vote(2.0)]).stop
    votes = [Vote(0.25), Vote(0.5, stop_s=30.0), Vote(0.25, stop_s=20.0)]
    assert decide(votes) == Decision(loss=1.0, stop_s=20.0, save=False)
    assert decide(votes).stop
    assert decide([Vote(0.0, stop_s=0.0), Vote(0.0)]).stop, "no grace at all is a stop too"


@pytest.mark.parametrize(
    ("due", "busy", "save"),
    [
        ((True, False), (False, False), True),
        ((False, True), (False, False), False),
        ((True, True), (False, True), False),
        ((True, True), (True, False), False),
    ],
)
def test_a_checkpoint_is_due_by_rank_0_and_waits_for_the_slowest(
    *, due: tuple[bool, bool], busy: tuple[bool, bool], save: bool
) -> None:
    votes = [Vote(0.0, due=d, busy=b) for d, b in zip(due, busy, strict=True)]
    assert decide(votes).save is save


@given(batch=st.integers(1, 40), size=st.integers(1, 40), ranks=st.integers(1, 9))
def test_every_rank_makes_as_many_passes_and_all_samples_are_taken_once(
    batch: int, size: int, ranks: int
) -> None:
    shares = [microbatch.shares(batch, size, World(rank, ranks)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert sum(map(sum, shares)) == batch
    most = microbatch.most_at_once(batch, size, World(0, ranks))
    assert max(map(max, shares)) == most
    fits = [share for share in shares if 0 in share]
    assert all(share[: share.index(0)].count(0) == 0 for share in fits), "at the end"


def test_the_world_is_what_torchrun_says() -> None:
    told = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    world = world_of(told)
    assert (world.rank, world.size, world.local_rank, world.first) == (5, 8, 1, False)
    assert world_of({}) is ALONE
    assert world_of({"RANK": "0", "WORLD_SIZE": "1"}) is ALONE


def test_a_world_of_one_decides_by_itself_and_meets_nobody() -> None:
    ALONE.open(torch.device("cpu"), 1.0)
    assert not torch.distributed.is_initialized()
    assert ALONE.sums([1.5, 2.0]) == [1.5, 2.0]
    assert ALONE.texts("a") == ["a"]
    ALONE.check_same("nothing", "a")
    assert ALONE.decide(Vote(3.0, due=True)) == Decision(3.0, NO_STOP_S, save=True)


def test_two_ranks_on_one_gpu_are_told_so_before_nccl_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where only some of them know: each gets the same answer."""
    gpus = {"cuda:0": "GPU-aa", "cuda:1": "GPU-bb", "cpu": ""}
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(ranks, "gpu_of", lambda device: gpus[str(device)])

    def meet(own: int, *devices: str) -> None:
        told = iter([[str(PROTOCOL)] * len(devices), [gpus[device] for device in devices]])
        world = World(own, len(devices))
        monkeypatch.setattr(world, "texts", lambda text: check_told(next(told), own, text))
        world.open(torch.device(devices[own]), 1.0)

    def check_told(told: list[str], own: int, text: str) -> list[str]:
        assert told[own] == text
        return told

    meet(1, "cuda:0", "cuda:1")
    meet(1, "cpu", "cpu")
    for rank in range(3):
        with pytest.raises(RankError, match="ranks 0 and 2 both compute on GPU-aa, and NCCL"):
            meet(rank, "cuda:0", "cuda:1", "cuda:0")


def test_ranks_may_share_a_gpu_where_nccl_was_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(uuid="0a1b")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert ranks.gpu_of(torch.device("cpu")) == ""
    assert ranks.gpu_of(torch.device("cuda", 0)) == "GPU-0a1b"
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    assert ranks.gpu_of(torch.device("cuda", 0)) == ""


def test_ranks_draw_from_seeds_of_their_own() -> None:
    seeds = {World(rank, 3).seed_of(1, samples) for rank in range(3) for samples in (0, 8)}
    assert len(seeds) == 6


# --- training -------------------------------------------------------------------------------------


def test_any_number_of_ranks_trains_the_same(
    straight: dict[int, tuple[list[Ended], Path]],
) -> None:
    (one,), _ = straight[1]
    assert len(one.losses) == STEPS
    for size in (2, 3):
        first, *others = straight[size][0]
        assert close(first.losses, one.losses)
        for name in ("bits_per_byte", "bits_per_byte_at_start", "bits_per_byte_best"):
            assert close([first.event("finished")[name]], [one.event("finished")[name]])
        assert first.event("started")["ranks"] == size
        assert (
            first.event("started")["trained_parameters"]
            == one.event("started")["trained_parameters"]
        )
        assert [rank.out for rank in others] == [""] * (size - 1), "rank 0 speaks for all"


def test_the_result_is_the_gathered_model_and_so_is_the_export(
    straight: dict[int, tuple[list[Ended], Path]], tmp_path: Path
) -> None:
    """Rank 0 wrote a folder from the model itself; the export reads the parts by range."""
    (_, kept), (_, of_one) = straight[2], straight[1]
    source = kept / f"checkpoint-{STEPS:09d}"
    result = load_file(kept / "result" / "model.safetensors")
    for kind in ("safetensors", "huggingface"):
        target = tmp_path / kind
        export.export(source, kind, target, model=str(kept / "result"), about={})
        exported = load_file(target / "model.safetensors")
        assert result.keys() <= exported.keys()
        assert all(same(exported[name], tensor) for name, tensor in result.items())
    export.export(source, "dcp", tmp_path / "dcp", about={})
    export.import_weights(tmp_path / "dcp", "dcp", tmp_path / "back")
    assert weights.of_checkpoint(tmp_path / "back").keys() == weights.of_checkpoint(source).keys()
    described = json.loads((kept / "result" / "config.json").read_text())
    assert described["architectures"] == ["GPT2LMHeadModel"]
    for name, tensor in load_file(of_one / "result" / "model.safetensors").items():
        assert result[name].shape == tensor.shape
        assert (result[name] - tensor).abs().max() < 1e-4


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_adapters_on_three_ranks_of_which_one_has_no_rows(
    precision: str, host: Host, tmp_path: Path
) -> None:
    """Matrices of two rows, and a batch of two samples: the third rank has none of either, and
    takes part in every pass. In bfloat16 the frozen model is of another type than the adapters."""
    chosen = {**PLAIN, "task": "lora", "steps": 3, "batch_size": 2, "precision": precision}
    (one,) = host.run(1, **chosen)
    kept = tmp_path / "kept"
    ranks = host.run(3, **chosen, checkpoint_directory=str(kept), output_directory=str(tmp_path))
    assert [rank.status for rank in ranks] == [0, 0, 0], ranks[0].err
    assert ranks[0].losses == pytest.approx(
        one.losses, rel=ROUNDING if precision == "float32" else 0.01
    )
    stored = weights.of_checkpoint(kept / "checkpoint-000000003")
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    named = {name.replace(".default", ""): entry for name, entry in stored.items()}
    assert adapter
    assert all(named[name].shape == tuple(tensor.shape) for name, tensor in adapter.items())
    assert all(same(weights.tensor_of(named[name]), tensor) for name, tensor in adapter.items())


def test_all_ranks_end_early_at_the_same_step(host: Host) -> None:
    """At a rate of nearly nothing no evaluation is better by more than rounding."""
    chosen = {**PLAIN, "learning_rate": 0.0, "evaluate_every": 1, "early_stop_patience": 2}
    ranks = host.run(2, **chosen)
    assert [rank.status for rank in ranks] == [0, 0]
    assert ranks[0].event("early_stop")["step"] == 2


# --- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2])
def test_the_same_world_goes_on_bit_for_bit(size: int, host: Host, tmp_path: Path) -> None:
    """Each rank draws from generators of its own, through dropout and noise."""
    kept = tmp_path / "straight"
    (first, *_) = host.run(size, **RANDOM, checkpoint_directory=str(kept))
    again = host.run(size, **RANDOM, checkpoint_directory=only(kept, SAVED, tmp_path / "again"))
    assert again[0].event("resumed")["level"] == "E0", again[0].event("resumed")
    assert first.losses[SAVED:] == again[0].losses
    if size == 1:
        return
    for left, right in zip(parts(kept, STEPS), parts(tmp_path / "again", STEPS), strict=True):
        assert tasks.differences(left, right) == []
    zero, one = parts(kept, STEPS)
    assert "random/torch_cpu" in tasks.differences(zero, one), "ranks draw different numbers"


@pytest.mark.parametrize(("writers", "readers"), [(2, 3), (3, 2), (1, 2), (3, 1)])
def test_another_world_goes_on_with_the_same_samples(
    writers: int,
    readers: int,
    straight: dict[int, tuple[list[Ended], Path]],
    host: Host,
    tmp_path: Path,
) -> None:
    (one,), _ = straight[1]
    kept = only(straight[writers][1], SAVED, tmp_path / "kept")
    chosen = {**PLAIN, "batch_size": 2, "accumulate": 4, "checkpoint_directory": kept}
    first, *others = host.run(readers, **chosen)
    assert [rank.status for rank in (first, *others)] == [0] * readers, first.err
    resumed = first.event("resumed")
    assert (resumed["level"], resumed["step"]) == ("E1", SAVED)
    assert f"the number of ranks was {writers} and is {readers}" in resumed["why"]
    assert close(first.losses, one.losses[SAVED:])
    found = ranges.load_any(Path(kept) / f"checkpoint-{STEPS:09d}")
    assert (found.world_size, found.samples) == (readers, STEPS * 8)
    if readers > 1:
        states = [part.random["torch_cpu"] for part in parts(Path(kept), STEPS)]
        assert len({bytes(state.tolist()) for state in states}) == readers, "seeded anew, each"


def test_a_part_that_is_gone_or_of_another_step_is_refused_by_all(
    straight: dict[int, tuple[list[Ended], Path]], host: Host, tmp_path: Path
) -> None:
    """As Baton restores it there is nothing else to take, and every rank says which part it is."""
    _, kept = straight[3]
    restored = Path(only(kept, SAVED, tmp_path / "kept")) / f"checkpoint-{SAVED:09d}"
    told = [{"BATON_RESTORE_DIR": str(restored)}] * 2
    other = restored / "rank-00001"
    shutil.rmtree(other)
    for rank in host.run(2, told, **PLAIN):
        assert rank.status == 1
        assert "rank 0: cannot read" in rank.err
        assert "rank-00001" in rank.err
    shutil.copytree(kept / f"checkpoint-{STEPS:09d}" / "rank-00001", other)
    for rank in host.run(2, told, **PLAIN):
        assert rank.status == 1
        assert "rank-00001 in" in rank.err
        assert "belongs to another checkpoint: its 'step' is 8" in rank.err


def test_a_torn_part_is_named_and_all_take_the_one_before(
    straight: dict[int, tuple[list[Ended], Path]], host: Host, tmp_path: Path
) -> None:
    """Only the second rank needs the rows that are cut off."""
    kept = tmp_path / "kept"
    shutil.copytree(straight[2][1], kept)
    torn = kept / f"checkpoint-{STEPS:09d}" / "rank-00001" / "of-this-rank-optimizer.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    chosen = {**PLAIN, "batch_size": 2, "accumulate": 4, "checkpoint_directory": str(kept)}
    ranks = host.run(2, **chosen)
    assert [rank.status for rank in ranks] == [0, 0], ranks[0].err
    assert ranks[0].event("started")["step"] == SAVED
    for rank in ranks:
        assert (
            "rank 1: rank-00001/of-this-rank-optimizer.safetensors"
            in rank.event("warning")["message"]
        )


def test_ranks_with_different_checkpoints_do_not_go_on(
    straight: dict[int, tuple[list[Ended], Path]], host: Host
) -> None:
    _, kept = straight[2]
    told = [{"BATON_RESTORE_DIR": str(kept / f"checkpoint-{s:09d}")} for s in (SAVED, STEPS)]
    for rank in host.run(2, told, **PLAIN):
        assert rank.status == 1
        assert "the place to resume from differs: 'step 4, 32 samples" in rank.err


# --- the ends of a gang ---------------------------------------------------------------------------


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[list[FakeAgent]]:
    made = [
        FakeAgent(
            tmp_path / f"agent-{rank}.sock",
            stores=True,
            slabs=agent_slabs.Slabs(1.0, lambda: PLENTY),
        )
        for rank in range(2)
    ]
    for agent in made:
        agent.start()
    yield made
    for agent in made:
        agent.stop()
        assert agent.slabs is not None
        agent.slabs.close()


def told_by(agents: list[FakeAgent], place: Path) -> list[dict[str, str]]:
    return [
        {
            "BATON_SOCKET": str(agent.path),
            "BATON_TOKEN": agent.token,
            "BATON_STAGING_DIR": str(place / f"staging-{rank}"),
            "BATON_GRACE_MS": "60000",
            "BATON_RANK": str(rank),
            "BATON_WORLD_SIZE": str(len(agents)),
        }
        for rank, agent in enumerate(agents)
    ]


def captured(agent: FakeAgent, message: dict[str, Any]) -> dict[str, bytes]:
    """The files of a checkpoint that was offered, from the slab or from its directory."""
    if "path" in message:
        return {file.name: file.read_bytes() for file in Path(message["path"]).iterdir()}
    assert agent.slabs is not None
    found = agent.slabs.newest("1.1")
    assert found is not None
    with agent.slabs.reading("1.1", found.name) as source:
        read = {e.path: source.read(e.offset_bytes, e.size_bytes) for e in source.files}
        source.check()
    return read


def test_a_stop_on_one_rank_is_obeyed_by_all_at_the_same_step(
    agents: list[FakeAgent], host: Host, tmp_path: Path
) -> None:
    """The signal comes in the middle of the second rank's step 3; rank 0 hears of it by the vote.
    What both hand over is one checkpoint, and training goes on from it."""
    stopping = {**PLAIN, "checkpoint_every_steps": 0, "stop_rank": 1, "stop_step": 3}
    ranks = host.run(2, told_by(agents, tmp_path), **stopping)
    assert [rank.status for rank in ranks] == [75, 75], ranks[0].err + ranks[1].err
    assert [rank.event("stopped")["checkpoint_step"] for rank in ranks] == [3, 3]
    assert "another rank" in ranks[0].event("stopping")["reason"]
    assert ranks[1].event("stopping")["reason"] == "SIGTERM"
    offered = [agent.expect("checkpoint") for agent in agents]
    assert [(message["step"], message["parts"]) for message in offered] == [(3, 2), (3, 2)]
    restored = tmp_path / "restored"
    for rank, (agent, message) in enumerate(zip(agents, offered, strict=True)):
        place = restored / ranges.name_of_part(rank)
        place.mkdir(parents=True)
        for name, data in captured(agent, message).items():
            (place / name).write_bytes(data)
    assert ranges.verify(restored).step == 3
    environments = [
        {**told, "BATON_RESTORE_DIR": str(restored)} for told in told_by(agents, tmp_path)
    ]
    again = host.run(2, environments, **PLAIN)
    (straight,) = host.run(1, **PLAIN)
    assert again[0].event("resumed")["level"] == "E0"
    assert close(again[0].losses, straight.losses[3:])
    messages = [agent.rest() for agent in agents]
    metrics = [
        [m["metrics"] for m in found if m["type"] == "progress" and m.get("metrics")]
        for found in messages
    ]
    assert metrics[0]
    assert not metrics[1], "figures come from rank 0"
    times = [m["time"] for m in messages[1] if m["type"] == "progress"]
    assert times[-1]["step_s"] > 0, "each rank accounts for its own time"
    steps = [[m["step"] for m in found if m["type"] == "checkpoint"] for found in messages]
    assert steps[0] == steps[1] == [SAVED, STEPS]


def test_what_is_captured_are_the_parts_that_would_be_written(host: Host, tmp_path: Path) -> None:
    """The same training once with directories and once with memory: the tensor files are the same
    bytes, and any number of ranks reads them."""
    captured = [tmp_path / ranges.name_of_part(rank) for rank in range(2)]
    ranks = host.run(2, [{"GANG_DESK": str(place)} for place in captured], **RANDOM)
    assert [rank.status for rank in ranks] == [0, 0], ranks[0].err
    assert all(line["captured"] for line in ranks[0].events if line["event"] == "checkpoint")
    host.run(2, **RANDOM, checkpoint_directory=str(tmp_path / "kept"))
    written = tmp_path / "kept" / f"checkpoint-{STEPS:09d}"
    for place in captured:
        names = {file.name for file in place.iterdir()}
        assert names == {file.name for file in (written / place.name).iterdir()}
        assert {f"of-this-rank-{part}.safetensors" for part in ("model", "optimizer")} < names
        for name in names - {checkpoint.STATE_FILE}:
            same_bytes = (place / name).read_bytes() == (written / place.name / name).read_bytes()
            assert same_bytes, f"{place.name}/{name}"
    assert ranges.verify(tmp_path).step == STEPS


def test_ranks_with_different_models_do_not_begin(host: Host) -> None:
    for rank in host.run(2, **PLAIN, other_rank=1):
        assert rank.status == 1
        assert "the model differs" in rank.err


def test_ranks_with_different_trainers_do_not_begin(host: Host) -> None:
    """In the middle of an upgrade, which is no failure of the job's."""
    for rank in host.run(2, **PLAIN, newer_rank=1):
        assert rank.status == 76
        older, newer = PROTOCOL, PROTOCOL + 1
        assert f"one) differs: '{older}' on rank 0, '{newer}' on rank 1\n" in rank.err
