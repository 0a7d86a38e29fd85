"""Prints the requirements of an extra of pyproject.toml, nested extras resolved, torch left out.

Used by the Makefile: it installs dependencies without building the project, and keeps the torch that is there.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path


def resolve(extra: str, project: dict) -> list[str]:
    requirements = []
    for line in project["optional-dependencies"][extra]:
        nested = re.fullmatch(r"narrowcast\[(.+)\]", line)
        if nested:
            for name in nested.group(1).split(","):
                requirements += resolve(name.strip(), project)
        else:
            requirements.append(line)
    return requirements


def main() -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    base = [line for line in project["dependencies"] if not line.startswith("torch")]
    print("\n".join(dict.fromkeys(base + resolve(sys.argv[1], project))))


if __name__ == "__main__":
    main()
