"""The virtual environments of peers, made on demand and kept in a folder."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from benchmarks.peers.registry import Peer

ROOT = Path(__file__).parents[2]
CONSTRAINTS = (ROOT / "constraints.txt", Path(__file__).with_name("constraints.txt"))
READY = ".ready"
"""Written last, with what the environment was made from."""


class NotInstalledError(Exception):
    """The environment of a peer can't be made, as without a network."""


def find_python(peer: Peer, folder: Path) -> Path:
    """The interpreter that runs a peer; its environment is made if it isn't there, or is of other versions.

    Raises:
        NotInstalledError: The environment can't be made; the message is one line.
    """
    if not peer.requirements:
        return Path(sys.executable)
    environment = folder / peer.module
    python = environment / "bin" / "python"
    made_from = _fingerprint(peer)
    ready = environment / READY
    if ready.is_file() and ready.read_text() == made_from:
        return python
    _execute(sys.executable, "-m", "venv", "--clear", str(environment))
    constraints = [argument for path in CONSTRAINTS for argument in ("--constraint", str(path))]
    options = ("--quiet", "--disable-pip-version-check", "--retries", "1", "--timeout", "30")
    _execute(str(python), "-m", "pip", "install", *options, *constraints, *peer.requirements)
    ready.write_text(made_from)
    return python


def _fingerprint(peer: Peer) -> str:
    parts = [sys.version, *peer.requirements, *(path.read_text() for path in CONSTRAINTS)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _execute(*command: str) -> None:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("ERROR", "Error"))] or lines[-1:]
        raise NotInstalledError(errors[0] if errors else f"{command[2]} ended with {done.returncode}")
