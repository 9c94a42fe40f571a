"""Several runs of the hosts suite, of all hosts or of some, as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def calmest(results: Sequence[dict[str, Any]], hosts: Sequence[str]) -> dict[str, Any]:
    """Each row of the run in which its two times were shortest.

    A machine that others use is slow for whole minutes, longer than all rounds of a row.

    Args:
        results: of one machine.
        hosts: in the order of the rows.
    """
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in (row for result in results for row in result["rows"]):
        found.setdefault((row["host"], row["call"]), []).append(row)
    best = [min(rows, key=lambda row: row["host_ms"] + row["ours_ms"]) for rows in found.values()]
    commits = dict.fromkeys(result["machine"]["commit"] for result in results)
    return dict(
        machine={**results[-1]["machine"], "commit": ", ".join(commits)},
        versions={host: version for result in results for host, version in result["versions"].items()},
        rows=sorted(best, key=lambda row: hosts.index(row["host"])),
        runs=max(map(len, found.values())),
    )
