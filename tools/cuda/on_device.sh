#!/usr/bin/env bash
# The CUDA tests on a card, in under nine minutes, with nothing that is not on the machine: `make test-cuda`, or
#     PYTHON=python3 OUT=logs bash tools/cuda/on_device.sh
# PYTHON: its numba-cuda, pytest and pytest-xdist are used, and torch where it has it. OUT: a folder for a log per stage,
# a new one unless given. SECONDS_IN_ALL: 530. STAGES: those wanted, in this order. A line per stage comes last.
# Exits with 0 where all stages passed, 1 where one did not, 3 where there is no card (or no driver, or no numba-cuda).
set -u
cd "$(dirname "$0")/../.." || exit 2
STAGES=${STAGES:-environment compile smoke tests memcheck racecheck torch bench encoders}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-530}
OUT=${OUT:-$(mktemp -d)} WORK=$(mktemp -d)
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2
trap 'rm -rf "$WORK"' EXIT
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    .venv/bin/python -c "import numba_cuda, pytest" 2> /dev/null && PYTHON=.venv/bin/python
fi

# numba-cuda wants libnvvm and libdevice. torch's wheels bring the other libraries and not these: name a toolkit.
for home in "${CUDA_HOME:-}" "$(dirname "$(dirname "$(readlink -f "$(command -v nvcc || echo /-/-)")")")" /usr/local/cuda*; do
    ls "$home"/nvvm/lib64/libnvvm.so* > /dev/null 2>&1 && export CUDA_HOME=$home CUDA_PATH=$home && break
done
[ -n "${CUDA_HOME:-}" ] && PATH=$PATH:$CUDA_HOME/bin:$CUDA_HOME/compute-sanitizer
export PATH PYTHONUNBUFFERED=1 PYTHONPATH=$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}
export NUMBA_CACHE_DIR=${NUMBA_CACHE_DIR:-$WORK/numba} CUDA_CACHE_PATH=$WORK/driver CUDA_CACHE_MAXSIZE=4294967296
export OMP_NUM_THREADS=4 OPENBLAS_NUM_THREADS=4

failed=0 summary=()
# stage NAME SECONDS COMMAND...: within its time and what is left of all; its log's last line goes into the summary
stage() {
    local name=$1 most=$2 log=$OUT/$1.log from=$SECONDS status
    shift 2
    case " $STAGES " in *" $name "*) ;; *) return 0 ;; esac
    [ $((SECONDS_IN_ALL - SECONDS)) -lt "$most" ] && most=$((SECONDS_IN_ALL - SECONDS))
    if [ "$most" -lt 8 ]; then
        failed=1; summary+=("$name: not run, no time is left"); return 1
    fi
    timeout --signal INT --kill-after 8 "$most" "$@" > "$log" 2>&1
    status=$?
    local said="FAILED ($status)"
    case $status in 0) said=passed ;; 3) said="not run" ;; 124 | 137) said="FAILED (out of time)" ;; esac
    [ $status -ne 0 ] && failed=1
    summary+=("$name: $said, $((SECONDS - from)) s: $(grep -v '^$' "$log" | tail -1 | cut -c1-200)")
    echo "${summary[-1]}"
    return $status
}

# Other packages' plugins stay out of pytest: what they warn of would be an error under this project's rules.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
tests=("$PYTHON" -m pytest -p xdist.plugin --cuda -q -rf --tb=short -p no:cacheprovider -W ignore::DeprecationWarning)
files=()
for file in tests/kernels/cuda/test_cuda_*.py; do
    case $file in *compile.py | *mutations.py | *torch.py) ;; *) files+=("$file") ;; esac
done
# One block shape of each kernel: a sanitizer slows a kernel down a hundredfold.
few="length-17 or encoder or feed_forward or a_norm or everything or pieces or decode-split or not_finite or score_tables or float_layer or dynamic_layer or padding_together"
fewer="length-17 or an_encoder_equals or dynamic_encoder or several_lengths or a_norm or not_finite or float_layer or test_dynamic_layer or padding_together"
workers=$(($(nproc) > 10 ? 8 : 2))

stage environment 60 "$PYTHON" tools/cuda/environment.py
status=$?
if [ $status -eq 3 ]; then
    echo "test-cuda: not run, $(tail -1 "$OUT/environment.log"). What needs no GPU: make test-cuda-offline." >&2
    exit 3
fi
stage compile 90 "$PYTHON" tools/cuda/compile_all.py --seconds 80
stage smoke 60 "${tests[@]}" "${files[@]}" -x -k "$few"
stage tests 150 "${tests[@]}" -n "$workers" "${files[@]}"
for tool in memcheck racecheck; do
    if command -v compute-sanitizer > /dev/null; then
        stage $tool 60 compute-sanitizer --tool $tool --error-exitcode 9 --print-limit 5 "${tests[@]}" "${files[@]}" -k "$fewer"
    else
        stage $tool 10 sh -c "echo 'compute-sanitizer is not on PATH: it comes with the CUDA toolkit'; exit 1"
    fi
done
stage torch 50 "${tests[@]}" -rs tests/kernels/cuda/test_cuda_torch.py
stage bench 70 "$PYTHON" -m benchmarks.cuda --rounds 5 --seconds 45
stage encoders 50 "$PYTHON" -m benchmarks.cuda_encoder --rounds 5 --seconds 25

for log in bench encoders; do [ -f "$OUT/$log.log" ] && { echo; cat "$OUT/$log.log"; }; done
grep -hE "^FAILED" "$OUT"/*.log 2> /dev/null | sed 's/ - .*//' | sort | uniq -c | head -30
grep -hE "ERROR SUMMARY|RACECHECK SUMMARY|========= (Invalid|Race|Error)" "$OUT"/memcheck.log "$OUT"/racecheck.log 2> /dev/null |
    sort | uniq -c | head -20
echo
printf '%s\n' "In all $SECONDS s; logs in $OUT" "${summary[@]}"
exit $failed
