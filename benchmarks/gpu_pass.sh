#!/usr/bin/env bash
# The whole GPU pass in four runs of under nine minutes each; results go to the folder named second. Each is useful if the
# next never runs.
#   benchmarks/gpu_pass.sh driver OUT   the CUDA kernels without torch: every case, memcheck and synccheck on some
#   benchmarks/gpu_pass.sh tests OUT    the operator suite on the GPU, sanitizers on small shapes
#   benchmarks/gpu_pass.sh tune OUT     tiles measured and written, then the tests that depend on them
#   benchmarks/gpu_pass.sh bench OUT    latemax and every peer at every shape, JSON
# TINY=1 rehearses each on any machine with small shapes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
step=${1:?driver, tests, tune or bench}
out=${2:?a folder for the results}
mkdir -p "$out"
tiny=${TINY:-}
python=${PYTHON:-python3}

case $step in
driver)
    # DRIVER: the program, built where a toolkit is (the command is at the top of tests/native/cuda_driver.cpp)
    driver=${DRIVER:-build/cuda_driver}
    capability=${CAPABILITY:-0}
    status=0
    timeout 240 "$driver" "$capability" 10 2>&1 | tee "$out/driver.log" || status=1
    if command -v compute-sanitizer > /dev/null; then
        for tool in memcheck synccheck; do
            for case in ${CASES:-0 17 60 170 230 251 270 295 342}; do
                timeout 20 compute-sanitizer --tool "$tool" --error-exitcode 1 "$driver" "$capability" case "$case" 2>&1 |
                    tail -3 | tee -a "$out/driver-$tool.log" || status=1
            done
        done
    fi
    exit $status
    ;;
tests)
    select=(tests/test_forward.py tests/test_backward.py tests/test_masks.py tests/test_nan_inf.py tests/test_edges.py
        tests/test_ragged.py tests/test_varlen.py tests/test_determinism.py tests/test_random.py tests/test_compile.py tests/test_gpu.py)
    [ -z "$tiny" ] || select=(tests/test_nan_inf.py tests/test_gpu.py)
    # a failure does not keep the sanitizers from running; it is the exit status at the end
    status=0
    timeout 400 "$python" -m pytest "${select[@]}" -q --maxfail=25 --junitxml "$out/tests.xml" 2>&1 |
        tee "$out/tests.log" || status=1
    if command -v compute-sanitizer > /dev/null; then
        for tool in memcheck racecheck; do
            timeout 60 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m pytest tests/test_forward.py -q \
                -k "(triton or cuda) and short and test_scores" 2>&1 | tail -5 | tee "$out/$tool.log" || status=1
        done
    fi
    exit $status
    ;;
tune)
    if [ -n "$tiny" ]; then
        TRITON_INTERPRET=1 timeout 500 "$python" -m benchmarks.tune --rehearse 2>&1 | tee "$out/tune.log"
    else
        timeout 480 "$python" -m benchmarks.tune --write --seconds 400 2>&1 | tee "$out/tune.log"
        cp "$("$python" -c 'from benchmarks.internals import tiles; print(tiles.TABLE_FILE)')" "$out/"
        timeout 50 "$python" -m pytest tests/test_select.py tests/test_forward.py -q -k "tile or pick or table or dtypes" 2>&1 | tail -3
    fi
    ;;
bench)
    # rows are written case by case; no case starts after 440 s
    timeout 530 "$python" -m benchmarks.suites.maxsim ${tiny:+--tiny} --seconds 440 --json "$out/bench.json" 2>&1 |
        tee "$out/bench.log"
    ;;
*)
    echo "unknown step: $step (driver, tests, tune or bench)" >&2
    exit 2
    ;;
esac
