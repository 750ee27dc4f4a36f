"""What a trainer writes into and reads from: one directory for each attempt on this node.

Problem: the supervisor refuses an attempt whose directory exists, because then it has run here
before; and a trainer's files must not lie among the records that say how it ended. So workspaces
have a tree of their own: `<state>/workspaces/<attempt>/` holds `staging/` (where a trainer builds
checkpoints), `restore/` (the files that it resumes from), `work/` (its own directory, when the job
names none) and `trainer.json` (a built-in trainer's configuration). Everything is 0700: a job's
data is nobody else's business.
"""

import shutil
from collections.abc import Collection
from pathlib import Path

from agent.ports import StartError

ROOM = ("staging", "work")
DIRECTORY_MODE = 0o700
FILE_MODE = 0o600


class AttemptDirectories:
    """Implements the `Workspace` port below `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def sweep(self, held: Collection[str]) -> None:
        """Drop the workspaces of attempts that are not `held`: an agent died before it could."""
        if self._root.is_dir():
            for path in self._root.iterdir():
                if path.name not in held:
                    shutil.rmtree(path, ignore_errors=True)

    def prepare(self, attempt_id: str) -> None:
        """Make what the attempt needs. Raises `StartError` with the system's reason."""
        try:
            self._root.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
            (self._root / attempt_id).mkdir(mode=DIRECTORY_MODE, exist_ok=True)
            for name in ROOM:
                (self._root / attempt_id / name).mkdir(mode=DIRECTORY_MODE, exist_ok=True)
        except OSError as error:
            sentence = f"cannot make {error.filename}: {error.strerror}"
            raise StartError(sentence, permanent=False) from error

    def restore_directory(self, attempt_id: str) -> str:
        return str(self._root / attempt_id / "restore")

    def staging_directory(self, attempt_id: str) -> str:
        return str(self._root / attempt_id / "staging")

    def write_trainer_config(self, attempt_id: str, config_json: str) -> None:
        """Whole or not at all, and once: after an agent's restart the trainer may be reading it.
        Raises `StartError`."""
        path = self._root / attempt_id / "trainer.json"
        partial = path.with_name("trainer.json.partial")
        try:
            if path.exists():
                return
            partial.touch(mode=FILE_MODE)
            partial.write_text(config_json, "utf-8")
            partial.replace(path)
        except OSError as error:
            sentence = f"cannot write {path}: {error.strerror}"
            raise StartError(sentence, permanent=False) from error

    def clear(self, attempt_id: str) -> None:
        """All of it; the log is the supervisor's, and stays until the node's cap pushes it out."""
        shutil.rmtree(self._root / attempt_id, ignore_errors=True)
