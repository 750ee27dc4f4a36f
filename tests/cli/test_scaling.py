"""`baton plan` and `baton scale`: tables in a pipe, documents, the plot, and what is not known."""

import json
import re
from dataclasses import replace
from pathlib import Path

import grpc

from coordinator import wire_capacity
from coordinator.core.scale_records import Deed, Hindsight
from coordinator.core.scale_requests import PlanPage
from protos.baton.v1 import capacity_pb2 as pb
from protos.baton.v1 import demand_pb2, nodes_pb2, types_pb2
from tests.cli.conftest import Baton
from tests.cli.fake_coordinator import FakeCoordinator, Refusal
from tests.wire.test_capacity_wire import PLAN, RECORD

LEVELS = tuple(float(n) for n in range(1, 10))
WHOLE = replace(RECORD, soon_gpus=LEVELS, later_gpus=LEVELS)
PAGE = PlanPage("advise", "as it is configured", True, 0.95, (PLAN,), (WHOLE,), 1_000)
JUDGED = replace(WHOLE, hindsight=Hindsight(2.5, (0.0, 0.75), 0.75))


def test_the_plan_is_a_table_with_what_it_proposes(baton: Baton, fake: FakeCoordinator) -> None:
    fake.answers["GetPlan"] = [wire_capacity.encode_plan(PAGE)]
    result = baton("plan")
    assert result.exit_code == 0
    _, row = result.stdout.splitlines()
    assert row.split()[:6] == ["H100", "1", "2", "3", "4", "5"]
    assert "14 are rented by the hour; 6 did not start; 7 are closed or lost" in row
    assert "mode advise: as it is configured; the plan is for 95% of cases" in result.stderr
    assert "`baton scale approve scale-7` carries out: suspend n3" in result.stderr
    assert "H100: 11 GPUs are needed, and 10 wanted now: so" in result.stderr
    document = json.loads(baton("plan", "--json").stdout)
    assert document["types"][0]["coverage_ratio"] is None
    assert document["types"][0]["boot_s"] == 540
    assert document["types"][0]["rented_gpus"] == 14


def test_the_newest_decision_says_how_old_it_is(baton: Baton, fake: FakeCoordinator) -> None:
    """By the coordinator's clock; an older one does not say when it was, and that is not now."""
    fake.unix_ms = 1_790_000_000_000
    decided = replace(PLAN, decided_unix_ms=fake.unix_ms - 7_380_000)
    fake.answers["GetPlan"] = [wire_capacity.encode_plan(replace(PAGE, types=(decided,)))]
    assert "baton: scale-7: so (2h03m ago)\n" in baton("plan").stderr
    older = replace(PLAN, decided_unix_ms=None)
    fake.answers["GetPlan"] = [wire_capacity.encode_plan(replace(PAGE, types=(older,)))]
    assert "baton: scale-7: so\n" in baton("plan").stderr


def test_a_type_of_which_there_is_nothing_has_no_row(baton: Baton, fake: FakeCoordinator) -> None:
    """Demand from before any node had joined."""
    answer = wire_capacity.encode_plan(PAGE)
    answer.types.add(gpu_type="other")
    fake.answers["GetPlan"] = [answer]
    assert [line.split()[0] for line in baton("plan").stdout.splitlines()] == ["GPU", "H100"]
    assert len(json.loads(baton("plan", "--json").stdout)["types"]) == 2


def test_the_plot_shows_demand_and_what_is_on(
    baton: Baton, fake: FakeCoordinator, tmp_path: Path
) -> None:
    fake.answers["GetPlan"] = [wire_capacity.encode_plan(PAGE)]
    nan = float("nan")
    fake.answers["GetDemand"] = [
        demand_pb2.GetDemandResponse(period_minutes=10, gpus=[1, 2, nan, 4, 3]),
        demand_pb2.GetDemandResponse(period_minutes=10),
    ]
    made_ms = 1_790_000_000_000
    came = [(1, 8, "done"), (2, 4, "proposed")]  # minutes before, GPUs then, what became of it
    decided = [
        replace(
            WHOLE, unix_ms=made_ms - minutes * 60_000, there_gpus=gpus,
            deeds=(Deed("suspend", ("n3",), state),),
        )
        for minutes, gpus, state in came
    ]  # fmt: skip
    said = [wire_capacity.encode_decision(each) for each in decided]
    fake.answers["ListDecisions"] = [pb.ListDecisionsResponse(decisions=said)]
    answer = wire_capacity.encode_plan(replace(PAGE, made_unix_ms=made_ms))
    fake.answers["GetPlan"] = [answer]
    path = tmp_path / "fleet.svg"
    assert baton("plan", "--plot", str(path)).exit_code == 0
    text = path.read_text("utf-8")
    assert text.rstrip().endswith("</svg>")
    assert "H100: wanted" in text
    assert "H100: should be on" in text
    points = re.findall(r'polyline points="([^"]*)"', text)
    past = [float(pair.split(",")[0]) for part in points[:2] for pair in part.split()]
    on_now = [float(pair.split(",")[0]) for pair in points[3].split()]
    assert min(on_now) == max(past), "what is on now is no history"
    assert "H100: was needed" in text
    was_on = [float(pair.split(",")[1]) for pair in points[-4].split()]
    four, eight, three = dict.fromkeys(was_on)
    assert eight < four < three, "a proposal left all that was there, and what was done did not"
    empty = baton("plan", "--plot", str(path))
    assert empty.exit_code == 1
    assert "there is no demand to be drawn yet" in empty.stderr


def test_a_type_that_nobody_ever_wanted_spoils_no_plot(
    baton: Baton, fake: FakeCoordinator, tmp_path: Path
) -> None:
    idle = replace(PLAN, gpu_type="L4")
    fake.answers["GetPlan"] = [wire_capacity.encode_plan(replace(PAGE, types=(idle, PLAN)))]
    fake.answers["ListDecisions"] = [pb.ListDecisionsResponse()]
    fake.answers["GetDemand"] = [
        Refusal(grpc.StatusCode.NOT_FOUND, "nothing of GPU type 'L4' was ever wanted"),
        demand_pb2.GetDemandResponse(period_minutes=10, gpus=[1, 2, 3]),
    ]
    path = tmp_path / "fleet.svg"
    shown = baton("plan", "--plot", str(path))
    assert shown.exit_code == 0, shown.stderr
    assert "no demand of L4 is drawn: nothing of GPU type 'L4'" in shown.stderr
    assert "H100: wanted" in path.read_text("utf-8")


def test_explain_shows_all_that_a_decision_went_by(baton: Baton, fake: FakeCoordinator) -> None:
    decided = [wire_capacity.encode_decision(one) for one in (WHOLE, JUDGED)]
    fake.answers["GetDecision"] = [pb.GetDecisionResponse(decision=one) for one in decided]
    result = baton("scale", "explain", "scale-7")
    assert result.exit_code == 0
    for part in (
        "scale-7: 1 node of H100 goes off (n3)",
        "4 on or starting, 1 runs, 2 wait, 3 of them guaranteed",
        "planned for 95% of cases: 5 needed, 6 kept on",
        "a node is expected to free within 2h00m; a rented GPU costs $3.90 an hour; 7 more",
        "8 come free before a start would be there; 9 GPUs more would keep the deadlines",
        "maximum demand within 10m00s, GPUs: 2.5% 1, 5% 2",
        "maximum demand within 2h00m, GPUs: 2.5% 1, 5% 2",
        "held back by: enough nodes went off",
        "proposed: suspend n3",
    ):
        assert part in result.stdout
    assert "what came of it is known 2.0 h after the decision" in result.stderr
    assert [line.split()[-1] for line in result.stdout.splitlines()[-2:]] == ["-", "-"]
    judged = baton("scale", "explain", "scale-7")
    assert "2.5 GPUs were wanted; regret $0.75" in judged.stderr
    assert [line.split()[-1] for line in judged.stdout.splitlines()[-2:]] == ["0.00", "0.75"]
    document = json.loads(baton("scale", "explain", "scale-7", "--json").stdout)
    assert document["alternatives"][0]["realised_usd"] == 0.0


def test_a_decision_is_drawn_with_what_was_expected_and_what_came(
    baton: Baton, fake: FakeCoordinator, tmp_path: Path
) -> None:
    decided = pb.GetDecisionResponse(decision=wire_capacity.encode_decision(JUDGED))
    fake.answers["GetDecision"] = [decided]
    nan = float("nan")
    came = demand_pb2.GetDemandResponse(period_minutes=10, gpus=[9, 2, 2, nan, 4, 3, *[1] * 14])
    came.begin_time.FromMilliseconds(JUDGED.unix_ms - 130 * 60_000)
    fake.answers["GetDemand"] = [came]
    fake.unix_ms = JUDGED.unix_ms + 3 * 3_600_000
    path = tmp_path / "decision.svg"
    shown = baton("scale", "explain", "scale-7", "--plot", str(path))
    assert shown.exit_code == 0
    text = path.read_text("utf-8")
    for name in ("wanted", "do nothing", "chosen", "needed", "the most, in 90%", "in 50%"):
        assert name in text, name
    drawn = re.findall(r'polyline points="([^"]*)"', text)
    assert len(drawn[0].split()) == 2, "not what was two hours before, nor through a hole"
    assert fake.requests[-1].gpu_type == "H100"
    assert fake.requests[-1].period_minutes == 1, "three hours ago, by the coordinator's clock"
    missing = baton("scale", "explain", "scale-7", "--plot", str(tmp_path / "no" / "such.svg"))
    assert missing.exit_code == 1
    assert "cannot be written" in missing.stderr


def test_a_node_that_was_ordered_on_and_is_not_up_is_named(
    baton: Baton, fake: FakeCoordinator
) -> None:
    deeds = (Deed("resume", ("n1", "n2", "n3"), "done"), Deed("suspend", ("n4",), "done"))
    decided = wire_capacity.encode_decision(replace(WHOLE, deeds=deeds))
    fake.answers["GetDecision"] = [pb.GetDecisionResponse(decision=decided)]
    failed = types_pb2.Node(
        id="n1", power=types_pb2.NODE_POWER_FAILED, reason="it did not start: no hello"
    )
    up = types_pb2.Node(id="n2", power=types_pb2.NODE_POWER_ON)
    fake.answers["ListNodes"] = [nodes_pb2.ListNodesResponse(nodes=[failed, up])]
    said = baton("scale", "explain", "scale-7")
    assert "done: resume n1 n2 n3" in said.stdout
    assert "baton: n1 is failed now: it did not start: no hello\n" in said.stderr
    assert "baton: n3 is not there any more\n" in said.stderr
    assert ("n2 is" in said.stderr, "n4" in said.stderr) == (False, False)
    json.loads(baton("scale", "explain", "scale-7", "--json").stdout)
    assert len(fake.requests) == 3, "a document is the decision alone"


def test_digits_that_say_nothing_are_not_shown(baton: Baton, fake: FakeCoordinator) -> None:
    soon = (0.1234, *(37.418 + 50 * n for n in range(1, 8)), 1234.4)
    said = replace(RECORD, level=0.95 + 1e-16, soon_gpus=soon, later_gpus=())
    decision = pb.GetDecisionResponse(decision=wire_capacity.encode_decision(said))
    fake.answers["GetDecision"] = [decision, decision]
    shown = baton("scale", "explain", "scale-7").stdout
    assert "GPUs: 2.5% 0.12, 5% 87, 10% 137" in shown
    assert "97.5% 1234\n" in shown
    assert json.loads(baton("scale", "explain", "scale-7", "--json").stdout)["level"] == 0.95


def test_no_decision_is_said_and_no_empty_table(baton: Baton, fake: FakeCoordinator) -> None:
    fake.answers["ListDecisions"] = [pb.ListDecisionsResponse()]
    result = baton("scale", "list", "--gpu-type", "H100")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "there is no decision about H100 yet" in result.stderr


def test_the_list_and_the_consent(baton: Baton, fake: FakeCoordinator) -> None:
    said = wire_capacity.encode_decision(JUDGED)
    fake.answers["ListDecisions"] = [pb.ListDecisionsResponse(decisions=[said])]
    listed = baton("scale", "list", "--count", "5", "--gpu-type", "H100")
    assert "scale-7" in listed.stdout
    assert " $0.75 " in listed.stdout
    assert (fake.requests[-1].count, fake.requests[-1].gpu_type) == (5, "H100")
    fake.answers["ApproveDecision"] = [
        pb.ApproveDecisionResponse(decision=said),
        Refusal(grpc.StatusCode.FAILED_PRECONDITION, "scale-7 proposes nothing"),
    ]
    approved = baton("scale", "approve", "scale-7")
    assert approved.stdout == "scale-7: ordered: suspend n3\n"
    assert "`baton plan` shows what comes of it" in approved.stderr
    again = baton("scale", "approve", "scale-7")
    assert again.exit_code == 1
    assert "scale-7 proposes nothing" in again.stderr
