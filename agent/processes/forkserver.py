"""A process that has imported what others wait for, and forks them: standard library only.

Problem: most of what lies between a start order and a job's first instruction is imports. A Python
interpreter of its own for each supervisor costs 15 ms of a core, and torch with transformers costs
seconds, while a GPU stands idle after every handoff.

How: the agent keeps one such process for supervisors, and one that has imported the built-in
trainers' libraries as well, in the trainers' own interpreter. A request is one datagram, the
attempt's directory with the status pipe beside it (SCM_RIGHTS, unix(7)). The server forks, and the
child *is* the shim (see `shim.py`); the trainer is forked once more, from the shim, and goes on in
the same interpreter where the job is a module that may, or is executed as ever. So a warm trainer
has the same supervisor, signals, output and exit record as any other.

A fork carries one thread over, and locks that other threads held stay locked for ever: a process
whose OpenMP or CUDA runtime has worked cannot be forked from. So nothing may be computed here, and
before each fork the kernel is asked whether there is one thread; if not, this server ends, and the
agent starts shims the slow way. CUDA may be at work without a thread: what asks whether there is a
GPU opens the driver, which then refuses every fork of that process (CUDA C++ Programming Guide,
"Initialization"), and a training there would go on without its GPU. So no device of the driver may
be open either.

    python [-I -S] forkserver.py CHANNEL MODULES PADDING

`CHANNEL` is the descriptor of a socket, or the path of one that listens, where this process is no
child of the agent's. There a request brings a gate in place of the pipe, an end of a socket pair:
the fork says its number and waits until it has been put where it belongs (see `warm_unit.py`), and
its status pipe lies in the attempt's directory. `MODULES` is a comma-separated list, empty for
supervisors alone. `PADDING`, and a variable of that name, make room where the kernel reads
arguments and environment from, so that a forked child can say what it is: what `ps` shows, and what
is looked for in `/proc/<pid>/cmdline` and `environ`, must be true of it (proc(5), fields 48 to 51
of `stat`).
"""

import gc
import os
import signal
import socket
import sys

if __name__ == "__main__":
    # executed by path, in an interpreter that knows no package of ours
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import shim  # type: ignore[import-not-found]

    del sys.path[0]
else:
    from agent.processes import shim

READY = b"ready"
UNAVAILABLE = b"unavailable"  # a module cannot be imported
GO = b"g"
SAID_BYTES_MAX = 64
REQUEST_BYTES_MAX = 8192  # a path, PATH_MAX is 4096
EXIT_NO_MODULE = 3
EXIT_THREADS = 4
DEVICES = "/dev/nvidia"  # as they all begin
TITLE, ENVIRONMENT = 45, 47  # where an area begins, among the fields after the command's name

MODULES: list[str] = []  # what this server has imported; none for supervisors alone


def serve(channel: socket.socket, *, gated: bool) -> int:
    """Fork a shim for each request until the agent's end is closed. Returns the exit status."""
    channel.send(READY)
    while True:
        data, descriptors, _, _ = socket.recv_fds(channel, REQUEST_BYTES_MAX, 1)
        if not data:
            return 0
        if why_not():
            return EXIT_THREADS
        pid = os.fork()
        if pid == 0:
            channel.close()
            become_shim(data, descriptors[0], gated=gated)
        for descriptor in descriptors:
            os.close(descriptor)


def why_not() -> str:
    """What forbids to fork this process; empty where nothing does."""
    count = thread_count()
    if count != 1:
        return f"{count} threads"
    return next((f"{path} open" for path in open_files() if path.startswith(DEVICES)), "")


def thread_count() -> int:
    """Of this process, as the kernel counts them."""
    return len(os.listdir("/proc/self/task"))


def open_files() -> list[str]:
    """What the descriptors of this process are of."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:
            continue  # the one that listed them
    return found


def become_shim(directory: bytes, descriptor: int, *, gated: bool) -> None:
    """In the child: from here on the same as a shim that was executed. Returns never."""
    try:
        os.setsid()
        if gated:
            if not wait_at(descriptor):
                os._exit(0)
            # without waiting: nobody reads it when the attempt has been given up
            descriptor = os.open(directory + b"/status", os.O_WRONLY | os.O_NONBLOCK)
            os.set_blocking(descriptor, True)
        os.dup2(descriptor, shim.STATUS_FD)
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        errors = os.open(directory + b"/shim.err", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        for source, target in ((null, 0), (null, 1), (errors, 2)):
            os.dup2(source, target)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        show(TITLE, [os.fsencode(sys.executable), b"-I", b"-S", b"shim.py", directory])
        shim.hold(directory, enter)
    except BaseException:  # the outermost frame of this program
        import traceback

        traceback.print_exc()  # the agent reads the last line
    finally:
        os._exit(0)


def wait_at(gate_fd: int) -> bool:
    """Whether this process is let through; not when whoever was to do that has gone."""
    with socket.socket(fileno=gate_fd) as gate:
        gate.send(b"%d" % os.getpid())
        return gate.recv(len(GO)) == GO


def enter(launch: shim.Launch) -> None:
    """In the trainer's process: run its module here, if this server was made for it; else execute
    its program. Returns never; raises OSError as `shim.execute` does."""
    if not MODULES or launch.arguments[1:3] != [b"-P", b"-m"]:
        shim.execute(launch)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # what exec would have closed
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)  # as a starting interpreter does
    show(TITLE, launch.arguments)
    os.environ.clear()
    for name, value in launch.environment.items():
        os.environ[os.fsdecode(name)] = os.fsdecode(value)
    # Ours first, should there not be room for all: by its token a job's leftover is known.
    entries = sorted(launch.environment.items(), key=lambda item: not item[0].startswith(b"BATON_"))
    show(ENVIRONMENT, [name + b"=" + value for name, value in entries])
    sys.argv = [os.fsdecode(argument) for argument in launch.arguments[3:]]
    os._exit(run_module(sys.argv[0]))


def run_module(name: str) -> int:
    """What `python -m` does with it; returns the exit status."""
    import atexit
    import runpy
    import threading
    import traceback

    status = 0
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if status and not isinstance(error.code, int):
            sys.stderr.write(f"{error.code}\n")
    except BaseException:  # the outermost frame of this program
        traceback.print_exc()
        status = 1
    # What an interpreter does at its end, but for taking itself apart.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def show(area: int, words: list[bytes]) -> None:
    """Put these where `/proc/self/cmdline` or `environ` is read from, as far as there is room."""
    import ctypes

    fields = shim.stat_fields(os.getpid())
    begin, end = int(fields[area]), int(fields[area + 1])
    text = b"\0".join(words)[: end - begin - 1]
    ctypes.memmove(begin, text.ljust(end - begin, b"\0"), end - begin)


def connect(channel: str) -> socket.socket:
    """To the agent. Raises OSError."""
    if channel.isdecimal():
        inherited = socket.socket(fileno=int(channel))
        inherited.set_inheritable(False)
        return inherited
    dialled = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    dialled.connect(channel)
    return dialled


def main() -> int:
    """Exit status: 0 when the agent has gone, 3 when a module cannot be imported, 4 when importing
    or forking would leave threads, or the driver, behind."""
    import ctypes  # noqa: F401 - before the first fork, so that no child waits for it

    channel = connect(sys.argv[1])
    signal.signal(
        signal.SIGCHLD, signal.SIG_IGN
    )  # the kernel reaps; shims are watched by the agent
    gc.disable()  # what imports make stays; looks through it are a sixth of their time
    try:
        for module in MODULES:
            __import__(module)
    except ImportError as error:
        sys.stderr.write(f"{error}\n")
        channel.send(UNAVAILABLE)
        return EXIT_NO_MODULE
    if reason := why_not():
        sys.stderr.write(f"importing {', '.join(MODULES)} leaves {reason}\n")
        return EXIT_THREADS
    gc.collect()
    gc.freeze()  # what is never looked at is never copied
    gc.enable()
    return serve(channel, gated=not sys.argv[1].isdecimal())


if __name__ == "__main__":
    MODULES = [name for name in sys.argv[2].split(",") if name]
    os._exit(main())
