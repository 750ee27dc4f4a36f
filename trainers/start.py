"""How a built-in trainer comes up: session first, configuration second, slow imports last.

Problem: torch and transformers take seconds to import. A stop that arrives meanwhile must not be
lost, and a misspelt key should be answered at once and not after those seconds. So the modules that
are run (``transfer``, ``finetune``, ``lora``) import nothing slow; they hand over a function that
does.

Exit statuses: 0 done, 2 wrong configuration, 1 anything else, 12 out of memory, 75 "checkpointed,
run me again", 76 "the ranks speak different protocols".
"""

import argparse
import gc
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import baton_sdk
from trainers import configuration, launcher

if TYPE_CHECKING:
    from trainers.loop import Task

EXIT_FAILURE = 1
EXIT_USAGE = 2
# ENOMEM, as errno(3) numbers it. The coordinator learns from it: of a job of one rank not even one
# sample fits.
EXIT_OUT_OF_MEMORY = 12

# EX_PROTOCOL of sysexits.h. To the coordinator it is no failure (`coordinator/core/mismatches.py`).
EXIT_PROTOCOL = 76


def run(
    kind: type[configuration.Options],
    import_builder: "Callable[[], Callable[[configuration.Options, Path], Task]]",
    arguments: Sequence[str],
) -> int:
    """Train what the file behind ``--config`` describes. Returns the exit status.

    ``import_builder`` does the slow imports and returns the function that makes the task from the
    configuration and the folder of its file.
    """
    with baton_sdk.connect(silent=launcher.silent(os.environ)) as session:
        parser = argparse.ArgumentParser(description=(kind.__doc__ or "").split("\n")[0])
        parser.add_argument("--config", required=True, type=Path, help="a .json or .toml file")
        parser.add_argument(
            "--relative-to", type=Path, help="where its relative paths begin; default: its folder"
        )
        given = parser.parse_args(arguments)
        file = given.config
        try:
            options = configuration.load(kind, file)
            folder = given.relative_to or file.parent
            return _train(options, import_builder, folder, session, os.environ)
        except configuration.ConfigurationError as error:
            sys.stderr.write(f"{error}\n")
            session.leaving(EXIT_USAGE, str(error))
            return EXIT_USAGE


def leave(status: int) -> NoReturn:
    """End the process at once. With torch loaded, the interpreter takes a second to take itself
    apart, and whoever is next on this GPU waits for it; all that matters is closed already."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _train(
    options: configuration.Options,
    import_builder: "Callable[[], Callable[[configuration.Options, Path], Task]]",
    folder: Path,
    session: baton_sdk.Session,
    environment: Mapping[str, str],
) -> int:
    problems = launcher.problems(environment)
    if problems:
        raise configuration.ConfigurationError("; ".join(problems))
    # The imports make some hundred thousand objects that stay; looking through them for garbage,
    # again and again as they grow in number, was a quarter of the start (2.9 s, without it 2.2 s).
    gc.disable()
    session.enter("init")
    build = import_builder()
    from trainers import checkpoint, loop, microbatch, ranks

    session.milestone("imports")
    if session.stop_requested is not None:
        session.leaving(baton_sdk.EXIT_RUN_AGAIN)
        return baton_sdk.EXIT_RUN_AGAIN
    loop.seed_everything(options.seed)
    task = build(options, folder)
    gc.freeze()
    gc.enable()
    try:
        return loop.Trainer(task, options, session, ranks.world_of(environment)).run()
    except checkpoint.CheckpointError as error:
        sys.stderr.write(f"cannot resume: {error}\n")
        session.leaving(EXIT_FAILURE, f"cannot resume: {error}")
        return EXIT_FAILURE
    except microbatch.TooLargeError as error:
        sys.stderr.write(f"{error}\n")
        session.leaving(EXIT_OUT_OF_MEMORY, str(error))
        return EXIT_OUT_OF_MEMORY
    except ranks.ProtocolError as error:
        sys.stderr.write(f"{error}\n")
        session.leaving(EXIT_PROTOCOL, str(error))
        return EXIT_PROTOCOL
    except ranks.RankError as error:
        sys.stderr.write(f"{error}\n")
        session.leaving(EXIT_FAILURE, str(error))
        return EXIT_FAILURE
