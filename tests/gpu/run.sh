#!/usr/bin/env bash
# What a GPU is needed for, in one command: the tests, the bench, a profile of one step.
#
#   tests/gpu/run.sh                  all of it, at most 250 s on an H100
#   STEPS="bench" tests/gpu/run.sh    parts of it: tests, bench, profile
#   tests/gpu/run.sh --device cpu     a rehearsal in tiny sizes
#
# Results go to $OUT (runs/gpu) as they come. A step that fails or takes too long stops nothing
# after it; the table at the end says how each went. Limits in seconds: TESTS_S, BENCH_S, PROFILE_S.
# More for a step: TESTS_ARGS, BENCH_ARGS, PROFILE_ARGS.

set -u -o pipefail
cd "$(dirname "$0")/../.." || exit

device=cuda
while [ $# -gt 0 ]; do
  case $1 in
    --device) device=${2:?--device needs a name}; shift 2 ;;
    --device=*) device=${1#*=}; shift ;;
    *) echo "tests/gpu/run.sh knows --device alone, not $1" >&2; exit 2 ;;
  esac
done

python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
out=${OUT:-runs/gpu}
mkdir -p "$out" || exit
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export MUSICGEN_UI_TEST_DEVICE=$device

tests=(-m pytest -p no:cacheprovider -m gpu tests/gpu --tb=short --durations=10 -rfE)
bench=(-m musicgen_ui bench --device "$device" --json "$out/bench.json")
profile=(-m musicgen_ui bench --device "$device" --profile "$out/profile.txt")
if [ "$device" = cpu ]; then
  tests_s=600 bench_s=300 profile_s=120
  bench+=(--published cuda --quick --precision bfloat16,bfloat16/int8)
  profile+=(--quick)
else
  tests_s=120 bench_s=100 profile_s=30
  bench+=(--published)
  profile+=(--jobs 1,8)
  tests+=(--timeout=60)
  "$python" -c "import xdist" 2>/dev/null && tests+=(-n 3)
fi

summary=""
failed=0

step() { # name, limit in seconds, python's arguments
  local name=$1 limit_s=$2 began=$SECONDS code
  shift 2
  echo "== $name: at most $limit_s s: $python $*"
  # An interrupt first: the bench then prints what it has.
  timeout --signal=INT --kill-after=10 "$limit_s" "$python" "$@" 2>&1 | tee "$out/$name.log"
  code=${PIPESTATUS[0]}
  case $code in
    0) code="passed" ;;
    124 | 137) code="took too long"; failed=1 ;;
    *) code="failed ($code)"; failed=1 ;;
  esac
  summary+=$(printf '%-8s %-14s %4d s  %s' "$name" "$code" $((SECONDS - began)) "$(last "$name")")$'\n'
  printf '%s' "$summary" >"$out/summary.txt"
}

last() { # the line of a log that sums it up
  case $1 in
    tests) grep -E '[0-9]+ (passed|failed|error)' "$out/tests.log" | tail -n 1 ;;
    bench) grep -cE '^ *(transformers|musicgen_ui) ' "$out/bench.log" | sed 's/$/ rows/' ;;
    *) grep -E 'steps a second' "$out/profile.log" | head -n 1 ;;
  esac
}

for name in ${STEPS:-tests bench profile}; do
  case $name in
    tests) step tests "${TESTS_S:-$tests_s}" "${tests[@]}" ${TESTS_ARGS:-} ;;
    bench) step bench "${BENCH_S:-$bench_s}" "${bench[@]}" ${BENCH_ARGS:-} ;;
    profile) step profile "${PROFILE_S:-$profile_s}" "${profile[@]}" ${PROFILE_ARGS:-} ;;
    *) echo "There is no step $name: choose tests, bench, profile." >&2; failed=1 ;;
  esac
done

echo
cat "$out/bench.log" "$out/profile.log" 2>/dev/null | grep -E '^ *(transformers|musicgen_ui|precision|step|kernels|read|between)' | head -n 60
echo "== results in $out"
printf '%s' "$summary"
exit $failed
