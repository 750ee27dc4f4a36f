"""What Python runs before the first line of any program that an agent has started.

This directory is the only thing that the agent puts on PYTHONPATH, and this file is the only thing
in it, so that nothing of Baton's installation shadows anything of the user's. It costs every Python
process of a job, also those that never train, so it imports nothing that Python has not imported
already, and only leaves two finders in `sys.meta_path`: one that waits for `transformers.trainer`,
and one, asked last, that finds `baton_sdk` where the environment has none of its own.

The environment's own `sitecustomize`, which this one hides, runs right afterwards, under its name;
its errors are its own. The syntax is that of old Pythons, in which this must at least do no harm.
"""

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_TARGET = "transformers.trainer"
_HERE = os.path.dirname(os.path.abspath(__file__))
# Beside this package lies baton_sdk, in the source tree as in an installation.
_PACKAGES = os.path.dirname(os.path.dirname(_HERE))
_OURS = ("baton_hook", "baton_sdk")
# What baton_sdk is written for; an older Python gets a sentence when it would matter.
_PYTHON_MIN = (3, 11)


class _Packages:
    """Finds our two packages, for those who have no other copy."""

    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> "ModuleSpec | None":
        return PathFinder.find_spec(name, [_PACKAGES]) if name in _OURS else None


class _Watch:
    """Lets the other finders find `transformers.trainer`, and has it patched once it has run."""

    def find_spec(
        self, name: str, path: object = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if name != _TARGET:
            return None
        for finder in sys.meta_path:
            # A finder from before Python 3.4 has no such method.
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = find and find(name, path, target)
            if spec:
                self._arm(spec)
                return spec  # type: ignore[no-any-return]
        return None

    def _arm(self, spec: "ModuleSpec") -> None:
        # The loader stays what it is, with its sources and tracebacks; only this instance of it is
        # told to call us afterwards.
        run = spec.loader.exec_module  # type: ignore[union-attr]

        def exec_module(module: "ModuleType") -> None:
            run(module)
            if module.__name__ == _TARGET and self in sys.meta_path:
                sys.meta_path.remove(self)
                _install(module)

        try:
            spec.loader.exec_module = exec_module  # type: ignore[union-attr, method-assign]
        except AttributeError as error:
            _say("cannot follow the import of " + _TARGET + ": " + str(error))


def _install(module: "ModuleType") -> None:
    """This must not fail, whatever the version of Python or transformers."""
    if sys.version_info < _PYTHON_MIN:
        _say("Trainer is not followed: that takes Python 3.11")
        return
    try:
        from baton_hook import trainer

        trainer.install(module)
    except Exception as error:
        _say("Trainer is not followed: " + type(error).__name__ + ": " + str(error))


def _say(sentence: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write("baton_hook: " + " ".join(sentence.split()) + "\n")


def _call_hidden() -> None:
    """Run the `sitecustomize` that would have run without this one, if there is one."""
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != _HERE]
    spec = PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None and spec.loader is not None:
        from importlib.util import module_from_spec

        module = module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if sys.version_info >= _PYTHON_MIN:
    sys.meta_path.append(_Packages())
if os.environ.get("BATON_SOCKET") and os.environ.get("BATON_HOOK") != "0":
    sys.meta_path.insert(0, _Watch())
_call_hidden()
