"""maxsim-cpu in a process of its own, which it can crash: prints its error and the seconds of its calls."""

from __future__ import annotations

import sys
import time

import maxsim_cpu
import numpy


def main(l_q: int, n_d: int, l_d: int, dim: int) -> None:
    random = numpy.random.default_rng(0)
    q, d = random.standard_normal((l_q, dim), "float32"), random.standard_normal((n_d, l_d, dim), "float32")
    q /= numpy.linalg.norm(q, axis=-1, keepdims=True)
    d /= numpy.linalg.norm(d, axis=-1, keepdims=True)
    truth = numpy.array([(document @ q.T).max(0).sum() for document in d])
    error = abs(numpy.asarray(maxsim_cpu.maxsim_scores(q, d)) - truth).max()
    times = []
    for _ in range(7):
        start = time.perf_counter()
        maxsim_cpu.maxsim_scores(q, d)
        times.append(time.perf_counter() - start)
    print(error, *times)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
