#!/usr/bin/env bash
# Everything that waits for a GPU, in under nine minutes, on a machine that needs no network:
#
#     bash results/h200/collect.sh [WHEELS [MINILM]]
#
# WHEELS: a folder with the wheels that the machine lacks (faiss-cpu, ir-measures and its pytrec-eval-terrier, bm25s; the peers
# late-interaction-kernels and flash-maxsim). They go into a folder of their own, and replace nothing. MINILM: a folder with
# MiniLM's weights; without it they are random. OUT=FOLDER: where logs, JSON and pictures go. PYTHON: the interpreter.
# TINY=1: the same in two minutes on a CPU, which measures nothing; what needs CUDA is skipped. BUDGET: seconds in all (530).
#
# A step that fails or runs out of time does not stop the next. summary.json says how each ended.
set -u
wheels=${1:+$(realpath "$1")} minilm=${2:+$(realpath "$2")} out=${OUT:+$(realpath -m "$OUT")}
cd "$(dirname "$0")/../.."
tiny=${TINY:-} python=${PYTHON:-python3} out=${out:-results/h200}
budget=${BUDGET:-530}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$out"
export TRITON_CACHE_DIR=$scratch/triton TORCHINDUCTOR_CACHE_DIR=$scratch/inductor
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 JAX_PLATFORMS=cpu PATH=$PATH:/usr/local/cuda/bin
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())' || echo 0)

note() {  # NAME STATUS SECONDS
    echo "{\"step\": \"$1\", \"status\": \"$2\", \"seconds\": $3}" >> "$scratch/steps"
    sed '$!s/$/,/; 1s/^/[/; $s/$/]/' "$scratch/steps" > "$out/summary.json"
    printf '%-12s %4d s  %s\n' "$1" "$3" "$2"
}

step() {  # NAME LIMIT COMMAND...
    local name=$1 limit=$2 start=$SECONDS left=$((budget - SECONDS)) code=0
    shift 2
    ((limit > left)) && limit=$left
    ((limit < 5)) && { note "$name" "no time left" 0; return; }
    timeout --kill-after=5 "$limit" "$@" > "$out/$name.log" 2>&1 || code=$?
    case $code in
        0) note "$name" ok $((SECONDS - start)) ;;
        124 | 137) note "$name" "out of time" $((SECONDS - start)) ;;
        *) note "$name" "failed with $code" $((SECONDS - start)) ;;
    esac
}

gpu_step() {
    if ((gpus)); then step "$@"; else note "$1" "skipped: no CUDA device" 0; fi
}

compile_ahead() {  # what is launched below, on all cores at once
    for n in {0..9}; do
        TORCHINDUCTOR_COMPILE_THREADS=1 timeout 100 "$python" bench.py --shapes $n --seconds 0 --out "$scratch/ahead$n" \
            > /dev/null 2>&1 &
    done
    for size in "" --tiny; do
        timeout 100 "$python" results/h200/throughput.py kernels $size --out "$scratch/ahead$size.json" > /dev/null 2>&1 &
    done
}

if [ -n "$wheels" ]; then
    # One by one: a wheel for another Python keeps none of the others out.
    step install 60 sh -c 'for wheel in "$0"/*.whl; do "$1" -m pip install --quiet --no-index --no-deps --no-compile --target "$2" \
        "$wheel" || code=1; done; exit ${code:-0}' "$wheels" "$python" "$scratch/site"
    export PYTHONPATH=$scratch/site
fi
step machine 20 sh -c "nvidia-smi; nproc; '$python' -m pip list 2>/dev/null | grep -iE '^(torch|triton|transformers|numpy|faiss|late|flash)'"

# The kernels, right?
((gpus)) && compile_ahead
"$python" -c 'import xdist' 2> /dev/null && workers="-n 8"
gpu_step tests 110 "$python" -m pytest -q -p no:cacheprovider ${workers:-} test_pairdistill.py \
    -k "triton or by_hand or fused_head or longer_than_it_was"
wait
# Which of a peer's and of torch.compile's configurations is the fastest was just asked on a busy machine: it is to be asked again.
find "$scratch" \( -name '*.autotune.json' -o -name '*.best_config' \) -delete
throughput() {  # NAME LIMIT PART...
    local name=$1 limit=$2
    shift 2
    step "$name" "$limit" "$python" results/h200/throughput.py "$@" ${tiny:+--tiny} ${minilm:+--minilm "$minilm"} \
        --out "$out/throughput.json"
}
throughput kernels 40 kernels

# And fast?
step bench 120 "$python" bench.py --out "$out/bench" ${tiny:+--shapes 2} --seconds 0.2

# The parts of the loop at the paper's sizes
throughput train 65 train
throughput teachers 75 teachers
if command -v compute-sanitizer > /dev/null; then  # each tensor in memory of its own, so that what lies beside it is not ours
    gpu_step sanitizer 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --target-processes application-only \
        --error-exitcode 9 "$python" results/h200/throughput.py kernels --tiny --out "$scratch/sanitizer.json" &
else
    note sanitizer "skipped: no compute-sanitizer" 0
fi

# The whole loop (beside the sanitizer: the seconds of neither are compared)
few=(--iters 0 --base-steps 1 --eval-queries 8 --rerank 0 --data "$scratch/few")
[ -n "$tiny" ] && "$python" - "$scratch/few" <<'END'
import sys
from pathlib import Path
from data import Collection, save_collection
ids = [f"d{n}" for n in range(300)]
qrels = {"train": {f"q{n}": {ids[n]: 1} for n in range(280)}, "test": {f"q{n}": {ids[n]: 1} for n in range(280, 300)}}
save_collection(Collection("few", ids, [f"number {n} is {n * 37} and {n % 7}" for n in range(300)],
                           {f"q{n}": f"what is number {n}" for n in range(300)}, qrels), Path(sys.argv[1]))
END
step docs 100 "$python" run.py --iters 2 --gpus 1 --out "$scratch/docs" ${tiny:+"${few[@]}"}
mkdir -p "$out/docs"
for file in config.json log.jsonl metrics.json report.png; do cp "$scratch/docs/$file" "$out/docs/" 2> /dev/null; done
wait
throughput retrieve 90 encode retrieve
step cost 20 "$python" results/cost/cost.py "$out/throughput.json" --out "$out/cost.json"

# With the time that is left: the launch table
gpu_step tune 100 "$python" bench.py --tune --out "$out/bench" --seconds 1
echo "$SECONDS s in all; results in $out"
