#!/usr/bin/env bash
# A borrowed GPU, first command (two minutes): half of the data, does a recorded step work, how fast is it.
# docs/gpu.md says how to use it.   Rehearsal: DEVICE=cpu SMALL=shapes:200 REPLAYS=1 OUT=out bash tools/gpu/first.sh
set -u
: "${DEVICE:=cuda}" "${KEEP:=$HOME/keep}" "${PY:=python3}" "${GPU:=.gpu}" "${OUT:=out}"
mkdir -p "$KEEP" "$OUT"
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=.
export CUDA_DEVICE_MAX_CONNECTIONS=32 TORCH_CUDAGRAPH_GC=1

say() { echo "== $SECONDS s: $*" | tee -a "$OUT/first.log"; }
step() {    # a time limit in seconds, a name, a command: its last line is shown, the rest is kept
    local limit=$1 name=$2
    shift 2
    timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
    say "$name rc $?: $(tail -n 1 "$OUT/$name.log" | cut -c1-200)"
}

say "$(nvidia-smi -L 2>&1 | head -1); $(df -h "$KEEP" | tail -1); git: $(command -v git)"
"$PY" tools/gpu/pack.py unpack "$GPU" "$KEEP/data" >"$OUT/unpack.log" 2>&1 &
unpack=$!

common=(--data_name "${SMALL:-shapes:2000}" --img_root "$KEEP" --save_root "$KEEP/save" --device "$DEVICE"
    --amp bf16 --deterministic --resume never --epochs 2)
step 60 base-graph "$PY" train_base.py --net_name resnet20 "${common[@]}" --cuda_graphs --note base-graph
step 60 base-plain "$PY" train_base.py --net_name resnet20 "${common[@]}" --note base-plain
kd=("$PY" train_kd.py --t_name resnet20 --t_model "$KEEP/save/base-graph/net.pt" --s_name resnet20 "${common[@]}")
step 60 kd-graph "${kd[@]}" --kd_mode st at crd --cuda_graphs --note kd-graph
step 60 kd-plain "${kd[@]}" --kd_mode st at crd --note kd-plain
step 60 kd-alone "${kd[@]}" --kd_mode at --cuda_graphs --note kd-alone

grep -h 'cannot be recorded' "$OUT"/*.log | cut -c1-300
for file in "$KEEP"/save/base-*/metrics.csv "$KEEP"/save/kd-*/*/metrics.csv; do
    echo "${file#"$KEEP"/save/} $(tail -n 1 "$file")"
done | tee -a "$OUT/first.log"
cmp "$KEEP/save/kd-graph/at/student.pt" "$KEEP/save/kd-alone/at/student.pt" && say 'alone equals together, bit for bit'
step 40 g1 "$PY" -m benchmarks.cuda replay --device "$DEVICE" --steps "${REPLAYS:-100}" --out "$OUT/g1.json"
wait "$unpack"
cat "$OUT/unpack.log"
say done
