"""What two trainings do beside one another: what is said before, and what a measurement settles."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.core import pairs
from coordinator.core.pairs import Lessons, Member, Sight, confirms, learn

RESNET = Member("resnet 64", "resnet")
RESNET_LARGER = Member("resnet 128", "resnet")
BERT = Member("bert", "bert")
LSTM = Member("lstm", "lstm")
ALONE = Member("a command")


def sight(
    who: Member, beside: Member, kept: float, seconds: float = 120, gpu_type: str = "A100"
) -> Sight:
    return Sight(who, beside, gpu_type, kept, seconds)


def both(one: Member, other: Member, kept: float, its: float) -> list[Sight]:
    return [sight(one, other, kept), sight(other, one, its)]


def test_of_two_unknown_trainings_a_trial_is_worth_its_price_and_nothing_is_promised() -> None:
    said = Lessons().forecast(RESNET, BERT, "A100")
    assert said.worth_trying
    assert not said.informed
    assert pairs.TRIAL_CHANCE_MIN <= said.chance < 0.5, "more often than not it will be bad"
    assert said.combined_ratio > 1


@pytest.mark.parametrize(
    ("one", "other", "worth"), [(1.0, 1.0, False), (0.3, 0.4, True), (0.9, 0.1, True)]
)
def test_who_uses_the_gpu_all_the_time_leaves_nothing_to_another(
    one: float, other: float, worth: bool
) -> None:
    said = learn([], {RESNET.name: one, BERT.name: other}).forecast(RESNET, BERT, "A100")
    assert said.worth_trying is worth


def test_two_that_leave_each_other_alone_are_not_faster_than_alone() -> None:
    said = learn([], {RESNET.name: 0.1, BERT.name: 0.2}).forecast(RESNET, BERT, "A100")
    assert said.one.expected_ratio == said.other.expected_ratio == 1.0
    assert said.combined_ratio == 2.0


@pytest.mark.parametrize(
    ("kept", "its", "good"),
    [(0.75, 0.8, True), (0.71, 0.71, True), (0.69, 1.0, False), (0.95, 0.3, False)],
)
def test_a_measurement_settles_it(kept: float, its: float, good: bool) -> None:
    assert confirms(kept, its) is good
    said = learn(both(RESNET, BERT, kept, its)).forecast(RESNET, BERT, "A100")
    assert said.measured == pytest.approx((kept, its))
    assert said.worth_trying is good


def test_half_a_measurement_settles_nothing_and_elsewhere_neither() -> None:
    half = learn([sight(RESNET, BERT, 0.3)])
    assert half.forecast(RESNET, BERT, "A100").measured is None
    whole = learn(both(RESNET, BERT, 0.3, 0.3))
    assert whole.forecast(RESNET, BERT, "H100").measured is None
    assert whole.forecast(RESNET, LSTM, "A100").measured is None


def test_twice_the_same_training_is_measured_by_one_of_them() -> None:
    said = learn([sight(RESNET, RESNET, 0.5)]).forecast(RESNET, RESNET, "A100")
    assert said.measured == pytest.approx((0.5, 0.5))
    assert not said.worth_trying


def test_kin_are_believed_less_than_oneself_and_more_than_strangers() -> None:
    lessons = learn(both(RESNET, BERT, 0.35, 0.35))
    before = Lessons().forecast(RESNET, BERT, "A100").combined_ratio
    same, kin, one_of_them, stranger = (
        lessons.forecast(one, other, "A100").combined_ratio
        for one, other in (
            (RESNET, BERT), (RESNET_LARGER, BERT), (RESNET, LSTM), (LSTM, ALONE),
        )
    )  # fmt: skip
    assert same < kin < one_of_them < stranger == pytest.approx(before)
    assert not lessons.forecast(RESNET_LARGER, BERT, "A100").worth_trying
    assert same < lessons.forecast(RESNET, BERT, "H100").combined_ratio < before


def test_jobs_without_a_family_are_no_kin() -> None:
    lessons = learn(both(ALONE, BERT, 0.3, 0.3))
    other = lessons.forecast(Member("another command"), LSTM, "A100")
    assert not other.informed
    assert other.combined_ratio == Lessons().forecast(ALONE, LSTM, "A100").combined_ratio


MEMBERS = st.sampled_from([RESNET, RESNET_LARGER, BERT, LSTM, ALONE])
SIGHTS = st.builds(
    sight, MEMBERS, MEMBERS, st.floats(0.05, 1.2), st.floats(120, 100_000),
    st.sampled_from(["A100", "H100"]),
)  # fmt: skip


@given(seen=st.lists(SIGHTS, max_size=12), one=MEMBERS, other=MEMBERS, data=st.data())
def test_what_is_seen_narrows_and_its_order_says_nothing(
    seen: list[Sight], one: Member, other: Member, data: st.DataObject
) -> None:
    said = learn(seen).forecast(one, other, "A100")
    shuffled = data.draw(st.permutations(seen))
    assert learn(shuffled).forecast(one, other, "A100") == said
    turned = learn(seen).forecast(other, one, "A100")
    assert turned.one.mean == pytest.approx(said.other.mean)
    assert turned.combined_ratio == pytest.approx(said.combined_ratio)
    fewer = learn(seen[:-1]).forecast(one, other, "A100")
    assert said.one.variance <= fewer.one.variance * (1 + 1e-9)


@pytest.mark.long
@given(
    seen=st.lists(SIGHTS, max_size=6),
    used=st.dictionaries(st.sampled_from(["bert", "lstm", "new"]), st.floats(0.1, 1.0)),
)
def test_who_is_taken_for_alike_is_told_what_he_would_be_told_himself(
    seen: list[Sight], used: dict[str, float]
) -> None:
    lessons = learn(seen, used)
    strangers = [Member("new"), Member("other"), Member("third", "kin"), Member("fourth", "kin")]
    everybody = [RESNET, RESNET_LARGER, BERT, LSTM, ALONE, *strangers]
    for one in everybody:
        for other in everybody:
            told, own = (ask(one, other, "A100") for ask in (lessons.about, lessons.forecast))
            assert (told.one, told.other) == (own.one, own.other)
            assert (told.measured, told.informed) == (own.measured, own.informed)
    assert len(lessons.answers) < len(everybody) ** 2


def test_of_many_the_newest_are_learned_from_and_all_are_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pairs, "SIGHTS_MAX", 2)
    old, new = both(RESNET, BERT, 0.3, 0.3), both(RESNET, LSTM, 0.9, 0.9)
    lessons = learn(old + new)
    assert not lessons.forecast(RESNET, BERT, "A100").worth_trying
    assert lessons.forecast(RESNET_LARGER, BERT, "A100").worth_trying
    assert not learn(new + old).forecast(RESNET_LARGER, BERT, "A100").worth_trying


def test_what_was_answered_is_not_worked_out_again_until_something_is_learned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, str, str]] = []
    forecast = Lessons.forecast

    def counted(self: Lessons, one: Member, other: Member, gpu_type: str) -> pairs.Forecast:
        asked.append((one.name, other.name, gpu_type))
        return forecast(self, one, other, gpu_type)

    monkeypatch.setattr(Lessons, "forecast", counted)
    seen = both(RESNET, BERT, 0.3, 0.3)
    lessons = learn(seen)
    assert [lessons.poor(RESNET, BERT, "A100") for _ in range(3)] == [True] * 3
    assert len(asked) == 1
    assert not lessons.poor(LSTM, ALONE, "A100")
    lessons.poor(RESNET, BERT, "H100")
    assert len(asked) == len(set(asked)) == 3
    better = learn([*seen, *(sight(one.who, one.beside, 0.95, 10**6) for one in seen)])
    assert not better.poor(RESNET, BERT, "A100")


def test_of_very_many_answers_some_are_worked_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "ANSWERS_MAX", 2)
    lessons = learn(both(RESNET, BERT, 0.3, 0.3))
    for _ in range(2):
        assert lessons.poor(RESNET, BERT, "A100")
        assert lessons.poor(BERT, RESNET, "A100")
        assert not lessons.poor(LSTM, ALONE, "A100")
        assert len(lessons.answers) <= 2
