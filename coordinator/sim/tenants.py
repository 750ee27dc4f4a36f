"""Quotas in virtual time: the production ledger and judgement, fed by what the policy decides.

Problem: a policy of the simulator sees who runs at each decision and not what anybody has used. So
the stays of jobs are kept here, as the coordinator has its attempts, and `core/quotas.py` says who
is beyond its quota. What starts between two decisions over all jobs is noted as well, and who comes
between them is judged by what the last decision has left of its project's entitlement.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from coordinator.core.allocation import Contender, Option
from coordinator.core.ledger import Ledger, Stay
from coordinator.core.quotas import PARTS, Claim, Quota, lending_weights, lent, weight_parts


@dataclass(slots=True)
class Tenants:
    """Of one simulation. `claims` and `known` are those of the jobs that have not ended."""

    quotas: Mapping[str, Quota]
    ledger: Ledger = field(default_factory=Ledger)
    known: dict[int, Contender] = field(default_factory=dict)
    claims: dict[int, Claim] = field(default_factory=dict)

    def judge(
        self, contenders: Iterable[Contender], now_ms: int
    ) -> tuple[list[Contender], Mapping[str, float]]:
        """The same, told whether they are beyond their quotas, and what projects weigh."""
        seen = {each.job_id: each for each in contenders}
        self.ended([job_id for job_id in self.known if job_id not in seen], now_ms)
        self.known = seen
        for contender in seen.values():
            # Who was killed by a failure has left since it was decided.
            self._hold(contender, contender.at, now_ms)
        return self._lent(seen.values(), now_ms), self._weights(now_ms)

    def decided(
        self, contenders: Iterable[Contender], options: Mapping[int, Option], now_ms: int
    ) -> None:
        for contender in contenders:
            self._hold(contender, options.get(contender.job_id), now_ms)

    def arrived(self, came: Iterable[Contender], now_ms: int) -> list[Contender]:
        new = list(came)
        for contender in new:
            self.known[contender.job_id] = contender
            self._hold(contender, None, now_ms)
        return self._lent(new, now_ms) if new else []

    def started(self, options: Mapping[int, Option], now_ms: int) -> None:
        for job_id, option in options.items():
            self._hold(self.known[job_id], option, now_ms)

    def ended(self, job_ids: Iterable[int], now_ms: int) -> None:
        for job_id in job_ids:
            self._hold(self.known.pop(job_id), None, now_ms)
            del self.claims[job_id]

    def _lent(self, contenders: Iterable[Contender], now_ms: int) -> list[Contender]:
        beyond = lent(self.claims.values(), self.quotas, self.ledger.used_h(now_ms))
        return [replace(each, lent=each.job_id in beyond) for each in contenders]

    def _weights(self, now_ms: int) -> Mapping[str, float]:
        return lending_weights(self.quotas, self.ledger.used_h(now_ms))

    def _hold(self, contender: Contender, option: Option | None, now_ms: int) -> None:
        """From now on it has the GPUs of this option, or none."""
        name, project = str(contender.job_id), contender.project
        before = self.ledger.stays.get(name)
        parts = 0 if option is None else option.gpus * weight_parts(option.gpu_type)
        if before is not None and before.parts != parts:
            # A job has one stay that goes on; those that are over keep their place in the books.
            self.ledger.note(f"{name} until {now_ms}", replace(before, end_ms=now_ms))
            self.ledger.forget(name)
            before = None
        if before is None and parts:
            self.ledger.note(name, Stay(project, parts, now_ms))
        wanted = option or max(contender.options, key=lambda each: each.rate)
        gpus = wanted.gpus * weight_parts(wanted.gpu_type) / PARTS
        self.claims[contender.job_id] = Claim(
            contender.job_id,
            project,
            contender.rank,
            contender.submitted_ms,
            gpus,
            option is not None,
        )
