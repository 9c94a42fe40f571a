"""What the CUDA kernels assume of the tensor cores and of their rings, without a GPU: CuTe's layouts are the oracle,
and every state of the rings that the planner makes is visited.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from test_cuda_emulated import emulator

from latemax.ops import tiles

ROOT = Path(__file__).parents[1]
MOST_STAGES, MOST_DIMS = 12, 768


def cutlass() -> Path | None:
    """The folder of CUTLASS's headers: of LATEMAX_CUTLASS, or of the wheel `nvidia-cutlass`."""
    if "LATEMAX_CUTLASS" in os.environ:
        return Path(os.environ["LATEMAX_CUTLASS"])
    try:
        import cutlass_library
    except ImportError:
        return None
    return Path(cutlass_library.__file__).parent / "source" / "include"


def toolkit() -> Path | None:
    """The folder of CUDA's headers."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    (line,) = (line for line in said.splitlines() if line.startswith("#$ INCLUDES="))
    return Path(line.split('"-I')[1].split('"')[0]).resolve()


@pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not())
@pytest.mark.skipif(cutlass() is None, reason="needs CUTLASS's headers: pip install nvidia-cutlass, or LATEMAX_CUTLASS")
@pytest.mark.skipif(toolkit() is None, reason="needs CUDA's headers (nvcc on PATH)")
def test_layouts_are_those_of_cute(tmp_path):
    program = tmp_path / "oracle"
    folders = [cutlass(), toolkit(), toolkit() / "cccl", emulator.HERE, ROOT / "csrc", ROOT / "csrc" / "cuda"]
    oracle = ROOT / "tests" / "native" / "cute_oracle.cpp"
    sources = [oracle, emulator.HERE / "emulator.cpp", emulator.HERE / "warp.cpp"]
    options = ["-std=c++17", "-w", *(f"-I{folder}" for folder in folders), *map(str, sources), "-o", str(program)]
    subprocess.run(["g++", *options], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "same\n", done.stdout


class Fault(AssertionError):
    pass


def states_of_ring(stages: int, parts: int, consumers: int, tiles: int, window: int, skips: bool = False) -> int:
    """Visits every state of a ring of document tiles, and returns their number.

    The producer fills stages in order, copies land in any order among the oldest ``window``, and each consumer
    releases a part when it has the next one, the last part of a tile when it has that. A wait sees only the parity of
    its barrier's phase: proved is that it ends in the right one, and that nobody waits forever. With ``skips``
    consumers take turns with the tiles and go over the others' without waiting, which is wrong.
    """
    total = tiles * parts

    def mine(consumer: int, position: int) -> bool:
        return not skips or position // parts % consumers == consumer

    def turns(position: int, stage: int) -> int:
        """How many positions before this one are at the stage."""
        return (position - stage + stages - 1) // stages

    def landed(issued: int, missing: frozenset, stage: int) -> int:
        return turns(issued, stage) - sum(position % stages == stage for position in missing)

    def released(state: tuple, stage: int) -> int:
        if skips:
            return sum(p % stages == stage and mine(k, p) for k, (_, done) in enumerate(state) for p in range(done))
        return sum(turns(done, stage) for _, done in state) // consumers

    start = (0, frozenset(), ((0, 0),) * consumers)
    seen, todo = {start}, [start]
    while todo:
        issued, missing, state = todo.pop()
        after = []
        if issued < total:
            stage, lap = issued % stages, issued // stages
            phase = released(state, stage)
            if phase % 2 != (lap - 1) % 2:
                if phase != lap:
                    raise Fault(f"the producer takes phase {phase} for {lap} at stage {stage}")
                after.append((issued + 1, missing | {issued}, state))
        for position in sorted(missing)[:window]:
            after.append((issued, missing - {position}, state))
        for k, (has, done) in enumerate(state):
            moved = None
            if has < total and not mine(k, has):
                moved = (has + 1, done)
            elif has < total and (done == has or has % parts):
                phase, lap = landed(issued, missing, has % stages), has // stages
                if phase % 2 != lap % 2:
                    if phase != lap + 1:
                        raise Fault(f"consumer {k} takes phase {phase} for {lap + 1} at stage {has % stages}")
                    moved = (has + 1, done)
            if moved:
                after.append((issued, missing, (*state[:k], moved, *state[k + 1 :])))
            if done < has and (done + 1 < has or has % parts == 0):
                after.append((issued, missing, (*state[:k], (has, done + 1), *state[k + 1 :])))
        if not after and (issued, missing, state) != (total, frozenset(), ((total, total),) * consumers):
            raise Fault(f"a deadlock: {issued} stages issued, consumers at {state}")
        if not skips:
            # consumers are alike
            after = [(i, m, tuple(sorted(s))) for i, m, s in after]
        todo += [x for x in after if x not in seen]
        seen.update(after)
    return len(seen)


def planned() -> set[tuple[int, int]]:
    """Stages and parts of every ring that the planner makes, of any GPU's shared memory."""
    found = set()
    for dim in range(64, MOST_DIMS + 1, 64):
        for n_q, l_q, own in ((1, 8, False), (1, 128, False), (9, 100, False), (4000, 32, False), (3, 300, True)):
            for shared in (101376, 166912, tiles.SHARED_MEMORY[90]):
                plan = emulator.planner(shared, 132).plan(n_q, 1000, l_q, 300, dim, own)
                if plan["rows"]:
                    found.add((plan["stages"], plan["parts"]))
    return found


@pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not())
def test_every_state_of_every_ring():
    rings = planned()
    assert {2, MOST_STAGES} <= {stages for stages, _ in rings} and {1, 12} <= {parts for _, parts in rings}
    for stages, parts in sorted(rings):
        # two turns and more, since a parity repeats after two
        few = -(-(2 * stages + 2) // parts)
        if stages <= 4:
            assert states_of_ring(stages, parts, 2, few, stages)
        else:
            assert states_of_ring(stages, parts, 2, few, 1)


def test_a_ring_whose_consumers_skip_tiles_is_found_wrong():
    for stages, parts in ((4, 5), (3, 5), (2, 6), (5, 2)):
        with pytest.raises(Fault):
            states_of_ring(stages, parts, 2, 8, stages, skips=True)
    # each stage belongs to one consumer
    assert states_of_ring(4, 2, 2, 8, 4, skips=True)
