"""Ask for advisories about each package of ``deployments/constraints.txt``: `make audit`.

pip-audit asks PyPI, and OSV where PyPI does not say. An advisory ends this with 1; that none can be reached is said,
and ends it with 0. (pip-audit itself finds "no known vulnerabilities" where it could look nothing up.)
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

PINS = Path(__file__).parents[1] / "deployments" / "constraints.txt"
DATABASES = ("pypi", "osv")
ACCEPTED: dict[str, str] = {}
"""Advisories that do not concern tpray: their id, and why. SECURITY.md says the same."""


class Findings(NamedTuple):
    """looked_up: how many packages a database knows. skipped: how many it does not. advisories: a line for each."""

    looked_up: int
    skipped: int
    advisories: list[str]


def read(report: dict[str, Any]) -> Findings:
    """What pip-audit's JSON says, without what is accepted."""
    packages = report["dependencies"]
    known = [package for package in packages if "skip_reason" not in package]
    found = [
        f"{package['name']} {package['version']}: {each['id']}, mended in {' '.join(each['fix_versions']) or 'none'}"
        for package in known
        for each in package["vulns"]
        if not {each["id"], *each.get("aliases", ())} & ACCEPTED.keys()
    ]
    return Findings(len(known), len(packages) - len(known), found)


def pins() -> str:
    """``name==version`` of each package, whatever Python it is for."""
    lines = (line.partition(";")[0].strip() for line in PINS.read_text().splitlines())
    return "".join(f"{line}\n" for line in lines if line and not line.startswith("#"))


def ask(database: str) -> Findings | None:
    """What a database says of all pins; None: it cannot be reached."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(pins())
        file.flush()
        options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json", "--timeout", "10"]
        asked = [sys.executable, "-m", "pip_audit", "-s", database, "-r", file.name, *options]
        try:
            done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=600)
            findings = read(json.loads(done.stdout))
        except (subprocess.TimeoutExpired, ValueError):
            return None
    return findings if findings.looked_up else None


def main() -> int:
    for database in DATABASES:
        findings = ask(database)
        if findings is None:
            print(f"audit: {database} has no advisories to ask from here")
            continue
        print(f"audit: {database} knows {findings.looked_up} packages, and {findings.skipped} not")
        for line in findings.advisories:
            print(f"audit: {line}: raise the pin, or say in tests/audit.py and SECURITY.md why it does not apply")
        return 1 if findings.advisories else 0
    print("audit: SKIPPED: no database of advisories can be reached; run `make audit` where one can")
    return 0


if __name__ == "__main__":
    sys.exit(main())
