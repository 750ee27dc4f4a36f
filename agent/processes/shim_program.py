"""The program of a shim: two modules whose code lies behind this one's, in the same file.

Problem: a shim lives for days, and may be started while an upgrade replaces the files that the
agent came from. So its program is one file that is written whole. But a path to import from would
cost milliseconds of each start, and one module for all of it would be a long one.

How: `spawn.write_program` puts the compiled code of this module and of `MODULES` into one file,
which the interpreter takes for this module's bytecode; it does not look at what follows.

    python -I -S shim.cpython-311.pyc ATTEMPT_DIRECTORY

With `--execute DIRECTORY` it is no shim, but becomes the program of that directory's `launch` at
once; with `--hold PID` it is the first process of a unit into which that shim has been moved.
"""

import marshal
import os
import sys

HEADER_BYTES = 16  # of a .pyc: magic number, flags, and eight that are of no use here
MODULES = ("shim_output", "shim")  # none before what it imports


def main() -> None:
    """Hold the trainer of this attempt, or what else is asked. Ends the process."""
    with open(sys.argv[0], "rb") as file:
        file.seek(HEADER_BYTES)
        marshal.load(file)  # noqa: S302 - this module, from our own file, as the interpreter did
        for name in MODULES:
            module = type(sys)(name)
            sys.modules[name] = module
            exec(marshal.load(file), module.__dict__)  # noqa: S102, S302 - likewise
    shim = sys.modules["shim"]
    if sys.argv[1] == "--execute":
        shim.execute(shim.read_launch(os.fsencode(sys.argv[2])))
    elif sys.argv[1] == "--hold":
        shim.accompany(int(sys.argv[2]))
    else:
        shim.hold(os.fsencode(sys.argv[1]))
    os._exit(0)  # all is on disk: taking the interpreter apart would be a sixth of a start's work


if __name__ == "__main__":
    main()
