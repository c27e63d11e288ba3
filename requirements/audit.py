"""Compares the lock with the known vulnerabilities, by pip-audit: `make audit`.

    exit 0   every package was looked up, and none has a known vulnerability
    exit 1   some have: each is named, with the version that mends it
    exit 2   at least one package could not be looked up. That is not a pass.

Arguments go to pip-audit: `--vulnerability-service osv`, `--ignore-vuln ID`.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


def verdict(report: dict[str, Any]) -> tuple[int, list[str]]:
    """The exit status and the lines to print, for pip-audit's JSON report."""
    lines, vulnerable, unknown = [], 0, []
    for package in report["dependencies"]:
        if "skip_reason" in package:
            unknown.append(package)
        for found in package.get("vulns", []):
            vulnerable += 1
            mended = ", ".join(found["fix_versions"]) or "no version yet"
            name = f"{package['name']} {package['version']}"
            lines.append(f"{name}: {found['id']}, mended in {mended}")
    total = len(report["dependencies"])
    if unknown or not total:
        why = f" ({unknown[0]['skip_reason']})" if unknown else ""
        lines.append(f"audit: {len(unknown)} of {total} packages could not be looked up{why}")
    lines.append(f"audit: {vulnerable} vulnerabilities in {total - len(unknown)} packages")
    if vulnerable:
        return 1, lines
    return (2 if unknown or not total else 0), lines


def main() -> int:
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(CONSTRAINTS)]
    command += ["--no-deps", "--disable-pip", "--format", "json", *sys.argv[1:]]
    result = subprocess.run(command, capture_output=True, text=True)
    try:
        report = json.loads(result.stdout)
    except json.JSONDecodeError:
        last = (result.stderr.strip() or "pip-audit printed nothing").splitlines()[-1]
        print(f"audit: no package could be looked up: {last}")
        return 2
    status, lines = verdict(report)
    print("\n".join(lines))
    return status


if __name__ == "__main__":
    sys.exit(main())
