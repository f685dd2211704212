"""Installs what ``make build`` made into fresh environments and uses it: ``python -m tests.smoke PYTHON...`` (``make smoke``)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

DIST = Path(__file__).parents[1] / "dist"
VERSIONS = ("3.11", "3.12", "3.13")
PREFIXES = ("DATABASE_URL", "GATHERING_", "PG", "PYTHON", "PIP_REQUIRE")
"""Variables that name another database, or another environment."""
PIPELINE = {
    "name": "Smoke",
    "status": "active",
    "nodes": [
        {"id": "start", "type": "trigger", "name": "Start"},
        {"id": "say", "type": "action", "name": "Say", "config": {"action": "say"}},
    ],
    "edges": [{"id": "e1", "from": "start", "to": "say"}],
}
HANDLERS = "def act(context):\n    return {'said': context.run.trigger_data['word']}\n\n\nHANDLERS = {'action': act}\n"


def smoke(python: str, archive: Path, folder: Path) -> str:
    """Install an archive into a new environment, and use it outside of the checkout; returns its version."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIXES)}
    environment |= {"GATHERING_DATA_DIR": str(folder / "data"), "PYTHONWARNINGS": "error"}

    def call(*words: object) -> str:
        done = subprocess.run(
            list(map(str, words)), cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"{' '.join(map(str, words))} exited with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def expect(condition: object, message: str) -> None:
        if not condition:
            sys.exit(f"{archive.name} on {python}: {message}")

    environment["PYTHONWARNINGS"] = "default"  # pip's own are not ours
    call(python, "-m", "venv", folder / "venv")
    own, command = folder / "venv" / "bin" / "python", folder / "venv" / "bin" / "gathering-pipeline"
    call(own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"{archive}[embedded,cli]")
    environment["PYTHONWARNINGS"] = "error"

    code = "import gathering_pipeline as package; print(package.__version__, package.__file__)"
    version, place = call(own, "-c", code).split()
    expect(place.startswith(str(folder)), f"{place} was imported")
    expect(f"-{version}" in archive.name, f"__version__ is {version}")
    expect(call(command, "--version").split()[-1] == version, "the command has another version")
    expect("CREATE TABLE" in call(command, "db", "sql"), "db sql prints no table")

    (folder / "pipeline.json").write_text(json.dumps(PIPELINE), encoding="utf-8")
    (folder / "mine.py").write_text(HANDLERS, encoding="utf-8")
    call(command, "db", "upgrade")
    call(command, "import", "pipeline.json")
    call(command, "runs", "create", "1", "--data", '{"word": "hello"}')
    call(own, "-m", "gathering_pipeline.worker", "mine:HANDLERS", "--partial", "--once")
    run = json.loads(call(command, "runs", "show", "1", "--json"))
    outputs = [node["output_data"] for node in run["nodes"]]
    expect((run["status"], outputs[1]) == ("completed", {"said": "hello"}), f"the run is {run['status']}: {outputs}")
    call(command, "runs", "report", "1", "-o", "report.html")
    expect("Smoke" in (folder / "report.html").read_text(encoding="utf-8"), "the report lacks its pipeline")
    expect(call(command, "db", "doctor") == "no problems found\n", "the doctor finds problems")
    return version


def main(pythons: Sequence[str]) -> None:
    """Smoke the wheel and the source archive on each Python."""
    found = pythons or [name for version in VERSIONS if (name := shutil.which(f"python{version}"))]
    archives = [*DIST.glob("*.whl"), *DIST.glob("*.tar.gz")]
    if not found or len(archives) != 2:
        sys.exit(f"{len(found)} Pythons, and {len(archives)} archives in {DIST}: make build writes two")
    for python in found:
        for archive in archives:
            begun = time.monotonic()
            with tempfile.TemporaryDirectory(prefix="gathering-smoke-") as folder:
                version = smoke(python, archive, Path(folder))
            kind = "wheel" if archive.suffix == ".whl" else "sdist"
            number = subprocess.run([python, "-V"], capture_output=True, text=True, check=True).stdout.strip()
            print(f"{number}: {kind} of {version}: passed in {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
