"""Serve the explorer on this machine."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

from mechlens.cli.console import say
from mechlens.core.errors import MachineError, SpecError

PLACES = (Path(__file__).parents[1] / "app", Path(__file__).parents[2] / "app")
"""where the explorer lies: in an installed package, in a clone"""


def _refuse_busy(port: int) -> None:
    """Raise MachineError if the port of the loopback address is not free."""
    if not 1 <= port <= 65535:
        raise SpecError(f"port is {port}; expected a number from 1 to 65535")
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("127.0.0.1", port))
        except OSError as error:
            raise MachineError(
                f"port {port} cannot be served on ({error.strerror}); name another with --port"
            ) from error


def serve(folder: Path, *, port: int) -> None:
    """Serve the explorer on the loopback address until it is stopped."""
    page = next((place / "main.py" for place in PLACES if (place / "main.py").is_file()), None)
    if page is None:
        raise MachineError(
            f"the explorer is in none of {', '.join(map(str, PLACES))}; install mechlens again"
        )
    _refuse_busy(port)
    say(f"http://127.0.0.1:{port} shows {folder}; stop with Ctrl-C")
    command = [sys.executable, str(page.with_name("serve.py")), "run", str(page), "--server.port", str(port)]
    server = subprocess.Popen([*command, "--server.fileWatcherType", "none", "--", str(folder.resolve())])
    # signals to this process do not reach the server by themselves
    before = signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    try:
        if (code := server.wait()) not in (0, -signal.SIGTERM):
            raise MachineError(f"the explorer ended with exit code {code}; what it printed above says why")
    finally:
        signal.signal(signal.SIGTERM, before)
        server.terminate()
