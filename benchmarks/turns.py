"""``peftlab`` commands that take turns: what the machine does to one, it does to the other.

A command stops itself, by SIGSTOP, before each cell of its comparison and goes on when it is told
to, so that its cells alternate with those of another command and no time of one holds another's.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Turns:
    """One command, from turn to turn; ``seconds`` are those of its turns.

    Args:
        words: of the command, after ``peftlab``.
        output: the file that gets what it prints.
    """

    def __init__(self, words: Sequence[str], env: Mapping[str, str], output: Path) -> None:
        self.seconds = 0.0
        self.exit_code: int | None = None
        self.words = words
        self._command = [sys.executable, __file__, *words]
        self._env, self.output = env, output
        self._process: subprocess.Popen[bytes] | None = None

    def take(self) -> None:
        """One turn: from the start of Python to the first cell, a cell, or the last and the end."""
        started = time.perf_counter()
        if self._process is None:
            with self.output.open("wb") as output:
                self._process = subprocess.Popen(self._command, env=self._env, stdout=output)
        else:
            self._process.send_signal(signal.SIGCONT)
        _, status = os.waitpid(self._process.pid, os.WUNTRACED)
        self.seconds += time.perf_counter() - started
        if not os.WIFSTOPPED(status):
            self.exit_code = self._process.returncode = os.waitstatus_to_exitcode(status)

    def kill(self) -> None:
        """End it where it stands, if it has not ended."""
        if self._process is not None and self.exit_code is None:
            self._process.kill()
            self._process.wait()


def alternate(commands: Sequence[Turns]) -> None:
    """Run them to their ends, turn by turn; who goes first changes from turn to turn.

    Raises:
        SystemExit: one failed.
    """
    order = list(commands)
    try:
        while waiting := [each for each in order if each.exit_code is None]:
            for each in waiting:
                each.take()
                if each.exit_code:
                    command = shlex.join(["peftlab", *each.words])
                    raise SystemExit(f"failed with exit code {each.exit_code}: {command}")
            order.reverse()
    finally:
        for each in order:
            each.kill()


def main() -> None:
    """What a command runs: ``peftlab``, with a stop before each cell."""
    from peftlab.cli import main as peftlab
    from peftlab.comparing.cells import CellRunner

    run = CellRunner.run

    def in_turn(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGSTOP)
        return run(*args, **kwargs)

    CellRunner.run = in_turn  # type: ignore[method-assign]
    peftlab(prog_name="peftlab")


if __name__ == "__main__":
    main()
