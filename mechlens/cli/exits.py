"""Exit codes of commands, and the one-line message when an error stops a command."""

from __future__ import annotations

import io
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from rich.console import Console

from mechlens.core import foreign
from mechlens.core.errors import MechlensError, one_line

REFUSED, STOPPED, SOFTWARE = 2, 130, 1
"""exit codes: of an error of input or machine, of Ctrl-C, and of a fault of mechlens"""


def code_of(action: Callable[[], object]) -> int:
    """Execute the action of a command line and return its exit code.

    The code is the one that the action returns, 0 if it returns none, or that of the error that stopped it.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # a terminal that cannot print a character prints a sign in its place instead of failing
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = action()
    except MechlensError as error:
        _say(str(error))
        return REFUSED
    except OSError as error:
        where = error.filename or "the file system"
        _say(
            f"{where}: {error.strerror or error}; choose another path or mend its permissions. Finished "
            "steps are kept"
        )
        return REFUSED
    except KeyboardInterrupt:
        _say("stopped; finished steps are kept, run the same command again to resume")
        return STOPPED
    return code if isinstance(code, int) else 0


def _say(text: str) -> None:
    Console(stderr=True, soft_wrap=True, markup=False, highlight=False).print(one_line(f"mechlens: {text}"))


class FaultsFiled(AbstractContextManager[None]):
    """Context of a command: writes the traceback of an unexpected exception to a file and exits.

    One line names the file; the exit code is `SOFTWARE`.
    """

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        if not isinstance(error, Exception):
            return
        handle, name = tempfile.mkstemp(prefix="mechlens-fault-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            traceback.print_exception(error, file=file)
        kind = f"{type(error).__name__}: {foreign.first_line(error)}"
        _say(
            f"a fault of mechlens itself ({kind}, from {foreign.place(error)}); please report {Path(name)}. "
            "Finished steps are kept"
        )
        raise SystemExit(SOFTWARE)
