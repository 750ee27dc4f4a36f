"""What the ranks of a gang do together: a step is done when all of them have come to it.

Problem: ranks that are simulated one by one would train on without each other, and no test would
see that a gang with a dead rank stands still. Real ones meet in a collective at every step: each
brings a word (was it asked to stop, does it still wait for its last checkpoint), all get all words,
and so all decide the same. When one is gone the others hang, or hear of a broken connection after a
while and fail; which of the two is the run's own chance.
"""

import asyncio
import random
from dataclasses import dataclass

BROKEN_MS = (100, 3_000)  # until the ranks that are left see a connection break, if they do


@dataclass(frozen=True, slots=True)
class Word:
    """`asked`: to stop. `busy`: nobody has answered for its last checkpoint. `save`: it was asked
    to save; rank 0's counts."""

    asked: bool
    busy: bool
    save: bool = False


class Gang:
    """Of one try of one job."""

    def __init__(self, world_size: int, chance: random.Random) -> None:
        self._world_size = world_size
        self._chance = chance
        self._words: dict[int, Word] = {}
        self._met: asyncio.Future[tuple[Word, ...]] | None = None
        self._broken = False

    async def meet(self, rank: int, word: Word) -> tuple[Word, ...]:
        """The words of all ranks, once all have come. Raises ConnectionError when one is gone and
        the others are to notice."""
        if self._broken:
            raise ConnectionError("a rank has gone")
        if self._met is None:
            self._met = asyncio.get_running_loop().create_future()
        met = self._met
        self._words[rank] = word
        if len(self._words) == self._world_size:
            words = tuple(self._words[known] for known in sorted(self._words))
            self._words, self._met = {}, None
            met.set_result(words)
        return await asyncio.shield(met)

    def left(self) -> None:
        """A rank is gone, however it went."""
        if self._chance.random() < 0.5:
            loop = asyncio.get_running_loop()
            loop.call_later(self._chance.randint(*BROKEN_MS) / 1000, self._break)

    def _break(self) -> None:
        self._broken = True
        met, self._met = self._met, None
        if met is not None and not met.done():
            met.set_exception(ConnectionError("a rank has gone"))
            met.exception()  # seen, also when nobody waits any more
