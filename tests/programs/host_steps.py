"""Prints one line per timed step of the host path."""

from benchmarks.suites import host

for row in host.steps():
    print(row)
