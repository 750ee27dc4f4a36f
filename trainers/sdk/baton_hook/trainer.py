"""The bridge between one `Trainer` and the agent, hung on by wrapping `Trainer.train`.

Problem: Trainer has callbacks, which is where progress, saves and stops belong, but a callback is
asked for nothing before the checkpoint to resume from has been chosen, and can end a training only
by letting it return, after which the script would go on as if it were complete. So `train` is
wrapped as well: to choose before it, and to leave with status 75 after a stop.

The session is opened by the first call of `train` and not before: it takes over SIGTERM, and a
program that only imports Trainer must die of one as it always did. After each call the handlers
that were there are back.

Several calls of `train` in one program are told apart by their number; what each reports begins
where the one before it ended, because a job's steps only grow. A call before the one that a
restored checkpoint belongs to runs again, as its results died with the node, and hands nothing
over, as that would be a step back.

With several ranks, all are followed or none, and only where their hooks understand one another
(`versions`); they agree on what they resume from (`agreement`), a stop is decided by all of them at
the same step, rank 0 hands over when all have written, with their random states (`states`), or each
does where each node has files of its own (`shards`), and all leave together.

Names that are used of transformers: Trainer, its `args`, `state`, `callback_handler`,
`add_callback` and `remove_callback`, TrainerCallback, and PREFIX_CHECKPOINT_DIR's value.
"""

import atexit
import functools
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import baton_sdk
from baton_hook import agreement, ranks, resume, shards, states, torn, versions
from baton_hook.guard import guarded, say
from baton_sdk.session import STOP_SIGNALS

NOTHING, SAVE, STOP = 0, 1, 2
"""What is wished for after a step; of several ranks' wishes the highest counts."""

BEST_IN_PARTS = (
    "load_best_model_at_end: each node has its own part of a checkpoint, which Trainer cannot load"
    " in the end; give all nodes one output_dir. After a handoff the best one is there whole"
)
UNREADABLE = "a rank cannot read the committed checkpoint where it is"

_Found = tuple[resume.Choice, resume.Found | None]
"""A rank's own choice, and the committed checkpoint that it has."""


class Program:
    """What this process knows over all its calls of `train`."""

    def __init__(self) -> None:
        self.session: baton_sdk.Session | None = None
        self.calls_count = 0
        self.steps_before = 0
        """Steps of the calls that are over."""
        self.saves_count = 0
        self._pid = 0
        self._ours: dict[signal.Signals, Any] = {}
        self._theirs: dict[signal.Signals, Any] = {}

    def begin(self) -> bool:
        """Open the session, or take the signals over again. False when it is not ours to do."""
        if self.session is None:
            handler = signal.getsignal(signal.SIGTERM)
            if isinstance(getattr(handler, "__self__", None), baton_sdk.Session):
                say("the script talks to Baton itself, so its Trainer is left alone")
                return False
            self._theirs = {number: signal.getsignal(number) for number in STOP_SIGNALS}
            self._pid = os.getpid()
            self.session = baton_sdk.connect()
            self._ours = {number: signal.getsignal(number) for number in STOP_SIGNALS}
            atexit.register(self.session.close)
            atexit.register(ranks.end_group_of_one)
            return True
        if self._pid != os.getpid():
            return False  # a fork; the thread that talks to the agent is the parent's
        self._theirs = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        _set_handlers(self._ours)
        return True

    def let_go(self) -> None:
        """Give the signals back."""
        guarded("giving signals back", lambda: _set_handlers(self._theirs), None)

    def end(self, steps: int) -> None:
        """A call is over: give the signals back, and count its steps."""
        self.let_go()
        self.calls_count += 1
        self.steps_before += steps


_program = Program()


def install(module: ModuleType) -> None:
    """Wrap `Trainer.train` of the module `transformers.trainer`."""
    original = module.Trainer.train

    @functools.wraps(original)
    def train(
        self: Any, resume_from_checkpoint: Any = None, *arguments: Any, **keywords: Any
    ) -> Any:
        go_on = functools.partial(original, self)
        # A trial of a hyper-parameter search is one of many, each with a directory of its own.
        in_search = keywords.get("trial", arguments[0] if arguments else None) is not None
        ours = not in_search and guarded("connecting to the agent", _program.begin, False)
        if not guarded("asking the other ranks", lambda: _all_of_ranks(self.args, ours), ours):
            if ours:
                say("another rank's Trainer is left alone, so this one is as well")
                _program.let_go()
            return go_on(resume_from_checkpoint, *arguments, **keywords)
        return _train(module, self, resume_from_checkpoint, go_on, (arguments, keywords))

    module.Trainer.train = train
    if os.environ.get("BATON_GPU_MEMORY_RATIO"):
        _keep_to_share(module, float(os.environ["BATON_GPU_MEMORY_RATIO"]))


def _keep_to_share(module: ModuleType, ratio: float) -> None:
    """A job that shares its GPU takes its part of it and no more. Trainer's first step is to put
    the model there; earlier, CUDA would be begun for a program that may still want to fork."""
    original = module.Trainer.__init__

    def limit() -> None:
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(ratio)

    @functools.wraps(original)
    def begin(self: Any, *arguments: Any, **keywords: Any) -> None:
        guarded("keeping to the share of the GPU", limit, None)
        original(self, *arguments, **keywords)

    module.Trainer.__init__ = begin


def _train(
    module: ModuleType, trainer: Any, asked: Any, go_on: Callable[..., Any], rest: Any
) -> Any:
    """One call of `train`, followed. Raises SystemExit after a stop."""
    assert _program.session is not None
    bridge = Bridge(_program, _program.session)
    arguments, keywords = rest
    chosen = guarded("choosing a checkpoint", lambda: bridge.choose(trainer.args, asked), asked)
    callback = guarded("following Trainer", lambda: _follow(module, trainer, bridge), None)
    try:
        result = go_on(chosen, *arguments, **keywords)
        if bridge.stopping:
            bridge.leave(trainer.args)
    finally:
        # A program that leaves stays deaf to a second SIGTERM: its status must say 75.
        if not bridge.left:
            if callback is not None:
                guarded("letting go of Trainer", lambda: trainer.remove_callback(callback), None)
            _program.end(guarded("counting steps", lambda: trainer.state.global_step, 0))
    return result


def _follow(module: ModuleType, trainer: Any, bridge: "Bridge") -> Any:
    """Add the callback; its class takes what it does not answer from Trainer's own base."""
    callback = type("BatonCallback", (_Callback, module.TrainerCallback), {})(bridge)
    trainer.add_callback(callback)
    return callback


class _Callback:
    """Trainer's events, each guarded. What `state`, `args` and `control` hold is in Trainer's own
    documentation."""

    def __init__(self, bridge: "Bridge") -> None:
        self._bridge = bridge

    def on_train_begin(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        guarded("reporting a milestone", lambda: self._bridge.session.milestone("load"), None)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        guarded("reporting progress", lambda: self._bridge.report(state), None)
        guarded("looking for older files", lambda: self._bridge.look(args, state), None)
        # Every rank asks at every step, whatever else went wrong: the answer is found together.
        wish = guarded("asking for a stop", lambda: self._bridge.wish(args, state), NOTHING)
        if wish != NOTHING:
            control.should_save = True
        if wish == STOP:
            control.should_training_stop = True
        return control

    def on_log(
        self, _args: Any, state: Any, _control: Any, logs: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        guarded("reporting metrics", lambda: self._bridge.keep_metrics(state, logs or {}), None)

    def on_evaluate(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        guarded("reporting a milestone", lambda: self._bridge.session.milestone("evaluated"), None)

    def on_save(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        # all have written when this has returned
        nothing: list[bytes] = []
        share = guarded("dividing a checkpoint", lambda: self._bridge.divide(args, state), None)
        told = guarded("asking for random states", lambda: _random_states(args, state), nothing)
        guarded(
            "handing over a checkpoint",
            lambda: self._bridge.hand_over(args, state, share, told),
            None,
        )
        if self._bridge.stopping:
            # Trainer would load the best model before it returns, which takes its time, and cannot
            # be done where each node has a part of it. Which one it is has just been written.
            state.best_model_checkpoint = None


class Bridge:
    """One call of `train`."""

    def __init__(self, program: Program, session: baton_sdk.Session) -> None:
        self.session = session
        self.stopping = False
        self.left = False
        self._program = program
        self._call = program.calls_count
        self._steps_before = program.steps_before
        self._metrics: dict[str, float] = {}
        self._ticket: baton_sdk.Ticket | None = None
        self._hands_over = True
        self._unreadable = False
        self._before: tuple[int, shards.Seen] = (0, {})
        """The step that may be saved next, and what lay in its directory."""
        self._best: tuple[Path, shards.Share] | None = None
        """The best checkpoint that this attempt has written, and what of it is this process's."""

    def choose(self, args: Any, asked: object) -> object:
        """What all ranks resume from: see `agreement`. One rank sets aside what is torn, then the
        others look."""
        found: _Found = (resume.Choice(asked, resume.UNKNOWN), None)
        first = args.local_process_index == 0
        for turn in (True, False):
            if first is turn:
                found = guarded(
                    "choosing a checkpoint", lambda: self._find(args, asked, first), found
                )
            guarded("waiting for the other ranks", lambda: ranks.barrier(args), None)
        own, restored = found
        numbers = (*agreement.numbers_of(own, restored), int(self._unreadable))
        highest = guarded("agreeing on a checkpoint", lambda: ranks.highest(args, numbers), numbers)
        if highest[-1]:
            guarded("waiting for the other ranks", lambda: ranks.barrier(args), None)
            _end(self.session, baton_sdk.EXIT_RUN_AGAIN, f"{UNREADABLE}: run all of us again")
        chosen = agreement.conclude(own, restored, highest)
        if chosen.sentence:
            say(chosen.sentence)
        if restored is not None and chosen.answer == str(restored.path) and first:
            guarded("laying out a checkpoint", lambda: _lay_out(args, restored), None)
        return chosen.answer

    def _find(self, args: Any, asked: object, first: bool) -> _Found:
        try:
            directory = self._restored()
        except OSError as error:
            # A full disk, or a broken one: two failures from it would set aside what is good.
            self._unreadable = True
            say(f"reading the committed checkpoint: {error}")
            return resume.Choice(asked, resume.UNKNOWN), None
        self._hands_over = resume.marked_call(directory) <= self._call
        restored = resume.committed(directory, self._call)
        otherwise = resume.Choice(asked, resume.UNKNOWN)
        if restored is not None:
            # A directory of the script's that cannot be read is no reason to lose what is held.
            otherwise = resume.of_committed(restored)
        own = guarded(
            "looking for the script's checkpoints",
            lambda: resume.choose(asked, Path(args.output_dir), restored, may_move=first),
            otherwise,
        )
        return own, restored

    def _restored(self) -> Path | None:
        """What the agent has laid out, of several parts one checkpoint. Raises SystemExit where
        that is none: to begin again would lose what an older one has, which comes after the second
        failure from this one; and OSError."""
        directory, staging = self.session.restore_directory, self.session.staging_directory
        if directory is None or staging is None:
            return directory
        together = resume.put_together(directory, staging)
        wrong = torn.problem(together) if together != directory else ""
        if wrong:
            step = self.session.restore_step
            _end(self.session, 1, f"the committed checkpoint of step {step} is no use: {wrong}")
        return together

    def look(self, args: Any, state: Any) -> None:
        """Before a save, when no rank has begun with it: see `shards`."""
        self._before = (state.global_step, {})
        if ranks.distributed(args) is not None and _saved(args, state).is_dir():
            self._before = (state.global_step, shards.look(_saved(args, state)))

    def divide(self, args: Any, state: Any) -> shards.Share:
        """What this process hands over of what all have saved. Raises `Scattered`, in all of
        them."""
        if ranks.distributed(args) is None:
            return shards.alone(state.is_world_process_zero)
        torch = sys.modules["torch"]
        ranks.barrier(args)  # of processes of one node, the last may still write
        step, before = self._before
        seen = guarded(
            "looking for what was saved",
            lambda: shards.written(
                _saved(args, state), before if step == state.global_step else {}
            ),
            None,
        )
        own = shards.Said(self.session.rank, seen)
        first = shards.decode(states.of_first(torch, args.device, shards.encode(own)))
        told = states.gather(torch, args.device, shards.encode(own.besides(first)))
        others = [shards.decode(data) for data in told]
        return shards.divide(first, others, args.process_index, self.session.world_size)

    def report(self, state: Any) -> None:
        """After every step."""
        if not state.is_world_process_zero:
            return
        self.session.milestone("first_step")
        total_steps = self._steps_before + state.max_steps if state.max_steps > 0 else None
        self.session.progress(self._steps_before + state.global_step, total_steps, self._metrics)

    def keep_metrics(self, state: Any, logs: Mapping[str, Any]) -> None:
        """What Trainer logs, for as long as it logs nothing newer of that name."""
        self._metrics |= {
            name: float(value) for name, value in logs.items() if isinstance(value, int | float)
        }
        if state.global_step > 0:
            self.report(state)

    def wish(self, args: Any, state: Any) -> int:
        """STOP: this step is the last of this attempt; SAVE: a checkpoint is asked for; the same on
        every rank. A training that is complete is not stopped: what is left is the script's own
        end."""
        asked = SAVE if self.session.take_save_request() else NOTHING
        own = asked if self.session.stop_requested is None else STOP
        (wish,) = ranks.highest(args, (own,))
        complete = state.global_step >= state.max_steps
        self.stopping = wish == STOP and not complete
        return NOTHING if complete else wish

    def hand_over(
        self, args: Any, state: Any, share: shards.Share | None, random_states: list[bytes]
    ) -> None:
        """Give the agent what Trainer has just saved, or this rank's part of it, and each rank's
        random states. Raises OSError, and `Torn` where a shard is missing."""
        self._ticket = None
        if share is None:
            return
        saved, staging = _saved(args, state), self.session.staging_directory
        shards.mark(saved, share)
        if getattr(state, "best_global_step", None) == state.global_step:
            self._best = saved, share  # Trainer itself names it when its directory is there
        if not share.speaks or not self._hands_over or staging is None:
            return
        shards.check(saved, share)
        # A launcher may start several processes in one attempt, one after another.
        self._program.saves_count += 1
        staged = staging / f"huggingface-{os.getpid()}-{self._program.saves_count}"
        if share.parts == 1:
            resume.link_tree(saved, staged)
        else:
            resume.link_files({Path(path): saved / path for path in sorted(share.paths)}, staged)
        if state.is_world_process_zero:
            states.add(random_states, staged)
        mark = {"version": 1, "call": self._call}
        (staged / resume.MARK_NAME).write_text(json.dumps(mark), "utf-8")
        if getattr(args, "load_best_model_at_end", False):
            try:
                self._add_best(state, saved, share, staged)
            except OSError as error:
                say(f"the best checkpoint does not come along: {error}")
        step = self._steps_before + state.global_step
        self._ticket = self.session.checkpoint(staged, step, parts=share.parts)

    def _add_best(self, state: Any, saved: Path, share: shards.Share, staged: Path) -> None:
        """The best checkpoint, unless it is this one: what this process has written of it, of a
        whole one all. Raises OSError."""
        if share.parts > 1:
            say(BEST_IN_PARTS)
        best = Path(state.best_model_checkpoint or saved)
        if best == saved or not best.is_dir():
            return
        target = staged / resume.BEST_NAME / best.name
        if not torn.is_part(best):
            if state.is_world_process_zero:
                resume.link_tree(best, target)
        elif self._best is not None and self._best[0] == best:
            mine = sorted(self._best[1].paths)
            resume.link_files({Path(path): best / path for path in mine}, target)
        else:
            say(f"{best} is in parts of an earlier attempt, and does not come along")

    def leave(self, args: Any) -> NoReturn:
        """End the program once the agent has the last checkpoint, or the grace is over."""
        stop, ticket = self.session.stop_requested, self._ticket
        own: tuple[int, ...] = (math.ceil(stop.remaining_s) if stop is not None else 0,)
        (left_s,) = guarded("asking for the grace", lambda: ranks.highest(args, own), own)
        if ticket is None and args.process_index != 0:
            say("stopped, as rank 0 was, which has the checkpoint")
        elif ticket is None:
            say("stopped, without a checkpoint of the last steps")
        elif ticket.wait_stored(left_s):
            say(f"stopped after step {ticket.step}, with its checkpoint: run me again")
        else:
            reason = ticket.reason or "the grace is over"
            say(f"stopped after step {ticket.step}, whose checkpoint is lost: {reason}")
        # A launcher ends the other ranks as soon as one has left.
        guarded("waiting for the other ranks", lambda: ranks.barrier(args), None)
        _tell(self.session, baton_sdk.EXIT_RUN_AGAIN)
        self.session.close()
        self.left = True
        sys.exit(baton_sdk.EXIT_RUN_AGAIN)


def _set_handlers(handlers: Mapping[signal.Signals, Any]) -> None:
    """Python allows it in the main thread only; elsewhere the session took none over either."""
    for number, handler in handlers.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


def _lay_out(args: Any, restored: resume.Found) -> None:
    if getattr(args, "load_best_model_at_end", False):
        resume.lay_out(restored, Path(args.output_dir))


def _all_of_ranks(args: Any, ours: bool) -> bool:
    """Whether every rank's Trainer is ours to follow. What ranks decide together needs all of them,
    up to the last step: one that is left alone would be waited for. Raises SystemExit where they
    would not understand one another."""
    (highest,) = ranks.highest(args, (versions.first_word(ours),))
    if highest >= versions.LEFT_ALONE:
        return False
    if ranks.distributed(args) is None:
        return True
    node = os.environ.get("BATON_NODE", "")
    assert _program.session is not None
    if highest == versions.UNNUMBERED:
        # It waits for us in what comes next, and is ended at once where another rank says this.
        _end(_program.session, versions.EXIT_PROTOCOL, versions.unnumbered(node))
    words = states.gather(sys.modules["torch"], args.device, versions.second_word(node))
    if wrong := versions.problem(words):
        # An upgrade under way is no failure of the job's, nor of its checkpoint.
        _end(_program.session, versions.EXIT_PROTOCOL, wrong)
    return True


def _end(session: baton_sdk.Session, status: int, sentence: str) -> NoReturn:
    """End the program before it has trained."""
    say(sentence)
    _tell(session, status, sentence)
    session.close()
    sys.exit(status)


def _tell(session: baton_sdk.Session, status: int, sentence: str = "") -> None:
    """The environment's own SDK may be older than this."""
    guarded("telling the agent", lambda: session.leaving(status, sentence), None)


def _saved(args: Any, state: Any) -> Path:
    """Where Trainer has written the step that it is at."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _random_states(args: Any, state: Any) -> list[bytes]:
    """Of all ranks, where there are several."""
    if ranks.distributed(args) is None:
        return []
    own = states.read(_saved(args, state), args.process_index)
    return states.gather(sys.modules["torch"], args.device, own)
