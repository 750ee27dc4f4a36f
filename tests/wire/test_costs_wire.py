"""Bills on the wire: what nobody knows is absent."""

import math

from coordinator import cost_rpc
from coordinator.core.cost_requests import (
    CostDay,
    CostLine,
    CostPage,
    GetCosts,
    Grouping,
    HourlyUse,
    Money,
)
from protos.baton.v1 import costs_pb2 as pb


def test_a_bill_arrives() -> None:
    money = Money(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0)
    uses = (
        HourlyUse("H100", 7_200_000, (0.5, 1.0), 2.0, 4.0, past_gpus=(3.0, math.nan, 2.0)),
        HourlyUse("x", 0, (1.0,), None, None),
    )
    page = CostPage(
        (CostLine("3", "train", money),), money, 2.5, (CostDay(86_400_000, money, 2.5),), uses,
        1_500, "prices", "energy", begin_unix_ms=2_000, end_unix_ms=9_000,
    )  # fmt: skip
    sent = cost_rpc.encode(page)
    (line,) = sent.lines
    assert (line.key, line.name, line.money.owned_usd, line.money.token_usd) == ("3", "train", 2, 9)
    assert sent.days[0].begin_time.ToMilliseconds() == 86_400_000
    assert (sent.idle_lease_usd, sent.total.tokens) == (2.5, 8)
    priced, unknown = sent.uses
    assert (list(priced.gpus), priced.lease_usd, priced.burst_usd) == ([0.5, 1.0], 2, 4)
    assert [priced.past_gpus[0], priced.past_gpus[2]] == [3, 2]
    assert math.isnan(priced.past_gpus[1]), "an hour in which nobody looked"
    assert not unknown.past_gpus
    assert not unknown.HasField("lease_usd")
    assert not unknown.HasField("burst_usd")
    assert sent.kept_since_time.ToMilliseconds() == 1_500
    assert (sent.begin_time.ToMilliseconds(), sent.end_time.ToMilliseconds()) == (2_000, 9_000)


def test_a_question_arrives() -> None:
    asked = pb.GetCostsRequest(grouping=pb.COST_GROUPING_JOB, project="demo")
    asked.begin_time.FromMilliseconds(5_000)
    open_ended = cost_rpc.decode(asked)
    assert open_ended == GetCosts(5_000, cost_rpc.UNIX_MS_MAX, Grouping.JOB, "demo")
    asked.end_time.FromMilliseconds(9_000)
    assert cost_rpc.decode(asked) == GetCosts(5_000, 9_000, Grouping.JOB, "demo")
    asked.last.FromMilliseconds(4_000)
    assert cost_rpc.decode(asked) == GetCosts(5_000, 9_000, Grouping.JOB, "demo", 4_000)
    asked.last.FromMilliseconds(-1)
    assert cost_rpc.decode(asked) == "last is -1 ms; it must be between 1 ms and 366 days"
    asked.ClearField("last")
    asked.grouping = 99  # type: ignore[assignment]
    assert cost_rpc.decode(asked) == "99 is no grouping that this coordinator knows"


def test_a_time_that_no_calendar_has_is_said_to_be_none() -> None:
    for field in ("begin_time", "end_time"):
        asked = pb.GetCostsRequest()
        getattr(asked, field).seconds = 9 * 10**15
        said = cost_rpc.decode(asked)
        assert said == "9000000000000000 s after 1970 is no time that is written down"
    asked = pb.GetCostsRequest()
    asked.last.seconds = 9 * 10**15
    assert "must be between 1 ms and 366 days" in str(cost_rpc.decode(asked))
