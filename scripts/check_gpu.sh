#!/usr/bin/env bash
# All there is to do on a machine with a GPU, without network, in about nine minutes: builds in place against the Python
# and torch found there, runs the tests on the device, the GPU benchmarks, and compute-sanitizer over a short solve.
#
#   scripts/check_gpu.sh FOLDER [STAGE...]
#
# leaves a log of every stage, summary.txt and gpu.json in FOLDER, of what a stage got done where its time ran out, too;
# fails if a stage did, after the others have run.
set -uo pipefail
stages="build tests_gpu benchmarks memcheck racecheck tests_others"
if [ $# -lt 1 ]; then
  echo "usage: $0 FOLDER [STAGE...]   the stages: $stages" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
folder=$(cd "$1" && pwd)
shift
wanted=" ${*:-$stages} "
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
exec </dev/null

python=${PYTHON:-python3}
PATH="$(dirname "$("$python" -c 'import sys; print(sys.executable)')"):$PATH" # its cmake and ninja
export PATH PYTHONUNBUFFERED=1
total=540 # seconds for all stages
failed=0
summary=$folder/summary.txt
: >"$summary"

note() { echo "$*" | tee -a "$summary"; }

stage() { # name, seconds, command...; the log is NAME.txt
  local name=$1 limit=$2 began=$SECONDS status
  shift 2
  if [[ $wanted != *" $name "* ]]; then return; fi
  if ((limit > total - SECONDS)); then limit=$((total - SECONDS)); fi
  if ((limit < 5)); then
    note "$(printf '%-14s not run: out of time' "$name")"
    failed=1
    return
  fi
  echo "=== $name (at most $limit s)"
  # At an interrupt pytest tells of the failures so far.
  timeout --signal=INT --kill-after=10 "$limit" "$@" >"$folder/$name.txt" 2>&1
  status=$?
  tail -n 6 "$folder/$name.txt"
  if ((status != 0)); then failed=1; fi
  case $status in
    0) note "$(printf '%-14s passed %4d s' "$name" $((SECONDS - began)))" ;;
    124 | 137) note "$(printf '%-14s OUT OF TIME after %d s' "$name" "$limit")" ;;
    *) note "$(printf '%-14s FAILED %4d s (status %d)' "$name" $((SECONDS - began)) "$status")" ;;
  esac
}

# Every op and both ways to a gradient, over a state of one block and one of many.
short_solve='
import os
import warnings

import torch
import pyode

warnings.filterwarnings("error", ".*device_loop")  # the host is to drive none of these solves


class Field(torch.nn.Linear):
    def forward(self, t, y):
        return super().forward(y)


torch.manual_seed(0)
caching = "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ
t = torch.linspace(0, 1, 5, device="cuda")
for shape, dtype in (((7, 3), torch.float32), ((300, 1001), torch.float32), ((33,), torch.complex128)):
    y0 = torch.randn(shape, dtype=dtype, device="cuda").requires_grad_()
    rate = torch.tensor(0.5, device="cuda", requires_grad=True)
    f = lambda t, y: -rate * y
    options = {"jump_t": [0.4]}
    for y in (
        pyode.odeint(f, y0, t, rtol=1e-4, atol=1e-6, options=options),
        pyode.odeint_adjoint(f, y0, t, rtol=1e-4, atol=1e-6, adjoint_params=(rate,)),
        pyode.odeint(f, y0, t, method="rk4"),
    ):
        y.abs().square().sum().backward()
    with torch.no_grad():
        exact = y0 * torch.exp(-0.5 * t[-1])
        assert (pyode.odeint(f, y0, t, rtol=1e-5, atol=1e-7)[-1] - exact).abs().max() < 1e-4
        pyode.odeint(lambda t, y: (-y[0], y[0]), (y0, y0), t, rtol=1e-4, atol=1e-6)
    if not caching:
        continue  # nothing can be captured then
    func = Field(shape[-1], shape[-1], bias=False, device="cuda", dtype=dtype)
    kinds = ("dopri5", {"jump_t": [0.4]}), ("dopri5", {"control": "per_sample"}), ("rk4", {}), ("explicit_adams", {})
    for method, more in kinds:
        given = {"rtol": 1e-3, "atol": 1e-5, "method": method, "options": {"device_loop": True, **more}}
        with torch.no_grad():
            pyode.odeint(func, y0, t, **given)
        restart = {"restart": True} if "jump_t" in more else {}
        y = pyode.odeint_adjoint(func, y0, t, **given, adjoint_options={**given["options"], **restart})
        y.abs().square().mean().backward()
torch.cuda.synchronize()
print("solved")
'

sanitizer() { # tool
  # Without torch's caching of memory, an access outside an allocation is one; only our kernels are looked at.
  local run=(compute-sanitizer --tool "$1" --kernel-name kns=pyode --report-api-errors no --error-exitcode 1
    "$python" -c "$short_solve")
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${run[@]}" && "${run[@]}"
}

# The tests need no plugin; with xdist they run in several processes.
pytest=("$python" -m pytest -p no:cacheprovider -p no:benchmark -o addopts="-q --strict-markers"
  -o faulthandler_timeout=100 --tb=short) # where a test hangs, or what has failed, is to be told in time
if "$python" -c 'import xdist' 2>/dev/null; then pytest+=(-n 8); fi

benchmarks() {
  XLA_PYTHON_CLIENT_PREALLOCATE=false "$python" -m benchmarks gpu gpu_large --seconds 2 --save "$folder/gpu.json"
  local status=$?
  "$python" -m pytest -o addopts= -q benchmarks/bench_gpu.py -k launches && return "$status"
}
export -f sanitizer benchmarks
export python short_solve folder

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  note "torch sees no GPU here: nothing was checked"
  exit 1
fi
note "$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>&1 | head -n 1)"
note "$(nvcc --version 2>&1 | tail -n 1)"
stage build 200 env PYODE_CUDA=1 PYODE_CUDA_ARCHITECTURES="${PYODE_CUDA_ARCHITECTURES:-native}" \
  "$python" setup.py build_ext --inplace
note "$("$python" -m pyode info 2>&1)"
stage tests_gpu 200 "${pytest[@]}" -m cuda tests
stage benchmarks 150 bash -c benchmarks
stage memcheck 75 bash -c 'sanitizer memcheck'
stage racecheck 75 bash -c 'sanitizer racecheck'
stage tests_others 540 "${pytest[@]}" -m "not cuda" tests

echo
echo "=== summary"
cat "$summary"
[ -f "$folder/benchmarks.txt" ] && grep '^[|{]' "$folder/benchmarks.txt" | tee -a "$summary"
for log in tests_gpu tests_others; do
  if [ -f "$folder/$log.txt" ]; then
    echo "$log: $(grep -E '^[0-9]+ (passed|failed|error|skipped)' "$folder/$log.txt" | tail -n 1)"
    grep -E '^(FAILED|ERROR) ' "$folder/$log.txt" | cut -c 1-200 | head -n 20
  fi
done | tee -a "$summary"
exit $failed
