"""`--share-gpu`: a size, or `auto`, which shares only where that pays.

Problem: whether two jobs fit on a GPU is a question of memory, and whoever says "share it if that
is worth it" has not said how much he takes. A trainer of language models whose model lies here can
be counted, as `baton fit` does; of any other program nobody knows, and a guess would end it for
want of memory. So `auto` is counted where that can be, with a margin, and else asks for a size.
"""

from typing import TYPE_CHECKING

from coordinator.cli.render import write_notice
from coordinator.cli.settings import BadInput
from coordinator.cli.units import format_size, parse_size

if TYPE_CHECKING:
    from coordinator.cli.client import Client
    from coordinator.cli.values import FitReport, JobSpec

AUTOMATIC = "auto"
# A prediction may be wrong by 15 percent, and 3 are what a driver leaves of a GPU (`baton fit`).
MARGIN_RATIO = 1.15 / 0.97
MIB = 1024**2


def parse_share(text: str) -> tuple[bool, int]:
    """Whether it is automatic, and bytes, 0 where those are to be counted: of "8GiB", "auto" or
    "auto:8GiB". Raises `ValueError` with a sentence."""
    word, colon, size = text.partition(":")
    if word != AUTOMATIC:
        try:
            return False, parse_size(text)
        except ValueError as error:
            raise ValueError(f"{error}; or auto, or auto:8GiB") from None
    if not colon:
        return True, 0
    size_bytes = parse_size(size)
    if not size_bytes:
        raise ValueError("auto:0 shares nothing; write it like auto:8GiB, or auto")
    return True, size_bytes


def with_size(client: "Client", spec: "JobSpec") -> "JobSpec":
    """The same with the size that it has been counted to take. Raises `BadInput` where nobody can
    say it."""
    if not spec.share_automatic or spec.shared_gpu_memory_bytes:
        return spec
    import msgspec

    from coordinator.cli import model_folder

    model = model_folder.of_job(spec) if spec.trainer else ""
    report = client.fit(msgspec.structs.replace(spec, share_automatic=False), model, {})
    needed_bytes = [
        one.memory_needed_bytes
        for one in report.fits
        if one.fitting == "fits" and one.memory_needed_bytes is not None
    ]
    if not needed_bytes:
        raise BadInput(f"{_why_not(report)}; say how much: --share-gpu auto:8GiB")
    size_bytes = -(-round(max(needed_bytes) * MARGIN_RATIO) // MIB) * MIB
    write_notice(f"it is counted to take {format_size(size_bytes)} of a GPU's memory at most")
    return msgspec.structs.replace(spec, shared_gpu_memory_bytes=size_bytes)


def _why_not(report: "FitReport") -> str:
    unknown = "how much of a GPU's memory it takes is not known"
    if not report.fits:
        return f"{unknown}: no node with a GPU has joined yet"
    if any(one.fitting for one in report.fits):
        return f"it fills a GPU and leaves nothing to share ({report.fits[0].memory_why})"
    return f"{unknown} ({report.fits[0].memory_why.removeprefix('unknown: ')})"
