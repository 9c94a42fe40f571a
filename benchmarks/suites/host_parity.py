"""How often latemax.compat was compared with the hosts' own functions, and every difference with its explanation.

    python -m benchmarks.suites.host_parity [--json FILE] [--hosts FOLDER]

Runs the checks of tests/programs/parity with 200 inputs each; `make test-hosts` runs the same.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from benchmarks import harness
from benchmarks.tables import Table, markdown

PROGRAM = harness.ROOT / "tests" / "programs" / "host_parity.py"
CASES = 200


def measure(folder: pathlib.Path, cases: int = CASES) -> dict[str, Any]:
    rows = {}
    for host in sorted({path.stem for path in (PROGRAM.parent / "parity").glob("*.py")} - {"common", "retrieval"}):
        path = [folder / host, folder / "libs", harness.ROOT / ".vision-libs", harness.ROOT]
        environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "LATEMAX_HOST_CASES": str(cases),
        }  # fmt: skip
        run = subprocess.run([sys.executable, str(PROGRAM), host], env=environment, stdout=subprocess.PIPE, text=True)
        if run.returncode:
            raise RuntimeError(f"{host}: {run.stdout[-2000:]}")
        rows[host] = json.loads(run.stdout.splitlines()[-1])
    return dict(machine=harness.machine(), cases=cases, hosts=rows)


def table(result: dict) -> str:
    """Comparisons of every check, and the differences."""
    lines = []
    for host, counters in result["hosts"].items():
        for check, n in counters["tried"].items():
            lines.append([host, check, n, counters["refused"].get(check, 0), "0"])
        for why, n in counters["differs"].items():
            if n:
                lines.append([host, why, "", "", n])
    return markdown(["host", "compared", "results", "the host raises", "differences"], lines) + (
        f"\n{result['cases']} inputs made by hypothesis for each check. A result that differs was compared with what "
        f"the line says instead. Commit {result['machine']['commit']}, {result['machine']['date']}.\n"
    )


TABLES = {"hosts-parity": Table("hosts-parity", table)}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--hosts", type=pathlib.Path, default=harness.ROOT / ".hosts", help="folder of the libraries")
    options = parser.parse_args()
    harness.finish(measure(options.hosts, 5 if options.tiny else CASES), table, options.json)


if __name__ == "__main__":
    main()
