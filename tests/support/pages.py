"""The Python of the README and of the pages in ``docs/``. ``python -m tests.support.pages FOLDER`` writes it there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    """The README and the pages."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def program(page: Path) -> str:
    """All blocks of a page as one program; each line has its number of the page."""
    text = page.read_text(encoding="utf-8")
    lines = [""] * text.count("\n")
    for match in BLOCK.finditer(text):
        first = text.count("\n", 0, match.start(1))
        body = match.group(1).splitlines()
        lines[first : first + len(body)] = body
    return "\n".join(lines) if any(lines) else ""


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for page in pages():
        if code := program(page):
            (folder / f"{page.stem.replace('-', '_').lower()}_page.py").write_text(code, encoding="utf-8")
