"""Serve the explorer on this machine."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from mechlens.cli.console import console
from mechlens.core.errors import MachineError, SpecError


def _refuse_busy(port: int) -> None:
    """Raises MachineError if nothing can be served on the port of the loopback address."""
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
    page = Path(__file__).parents[2] / "app" / "main.py"
    if not page.is_file():
        raise MachineError(
            f"the explorer is not at {page}; run `mechlens app` from a clone of the repository"
        )
    _refuse_busy(port)
    console.print(f"http://127.0.0.1:{port} shows {folder}; stop with Ctrl-C", highlight=False)
    command = [
        sys.executable,
        "-m",
        "streamlit",
        "run",
        str(page),
        "--server.port",
        str(port),
        "--server.fileWatcherType",
        "none",
    ]
    server = subprocess.Popen(
        [*command, "--", str(folder.resolve())], cwd=page.parents[1]
    )  # where its .streamlit/config.toml is
    try:
        if code := server.wait():
            raise MachineError(f"the explorer ended with exit code {code}; what it printed above says why")
    finally:
        server.terminate()  # signals to this process do not reach the server by themselves
