#!/usr/bin/env bash
# The recipe book: every command that trains something, runnable as a whole or by block.
#
#   bash example_train_script.sh quick      embedded data, CPU, a few minutes: teacher, baseline, students, table, figure
#   bash example_train_script.sh cifar10    CIFAR-10: get the data, base networks, every method, table, figure
#   bash example_train_script.sh base       ... only the teacher and the baseline
#   bash example_train_script.sh kd AT ...  ... only these methods, e.g. kd at rkd st+pkt
#   bash example_train_script.sh --help
#
# Interrupted, it continues where it stopped. Settings are the variables below, overridden from outside:
#   EPOCHS=12 T_NAME=resnet56 FLAGS='--amp bf16' bash example_train_script.sh cifar10
set -euo pipefail
cd "$(dirname "$0")"

DATA=${DATA:-cifar10}             # cifar10, cifar100, shapes, folder
IMG_ROOT=${IMG_ROOT:-./data}      # where data lies
SAVE_ROOT=${SAVE_ROOT:-./save}    # where results go
T_NAME=${T_NAME:-resnet110}       # teacher
S_NAME=${S_NAME:-resnet20}        # student
EPOCHS=${EPOCHS:-200}
SEED=${SEED:-2}
FLAGS=${FLAGS:-}                  # anything else for the training scripts, e.g. '--amp bf16'

# ---------------------------------------------------------------------------------------------- environment

# Use the active Python if it has what requirements.txt asks for, else make .venv once and use that.
choose_python() {
    local need='import torch, torchvision, numpy, scipy, tqdm, matplotlib
assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)'
    for PYTHON in "$(command -v python3 || true)" "$(command -v python || true)" .venv/bin/python; do
        if [ -n "$PYTHON" ] && "$PYTHON" -c "$need" 2>/dev/null; then return; fi
    done
    echo 'installing requirements into .venv (once; PyTorch is large) ...'
    [ -x .venv/bin/python ] || "$(command -v python3 || command -v python)" -m venv .venv
    PYTHON=.venv/bin/python
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements.txt
}

# -------------------------------------------------------------------------------------------------- blocks

names() {
    T_RUN=base-$DATA-$T_NAME-s$SEED
    S_RUN=base-$DATA-$S_NAME-s$SEED
    KD_RUN=kd-$DATA-$T_NAME-$S_NAME-s$SEED
}
names

run() {    # a training script with the common flags
    # shellcheck disable=SC2086  # FLAGS is several words on purpose
    "$PYTHON" "$@" --data_name "$DATA" --img_root "$IMG_ROOT" --save_root "$SAVE_ROOT" --epochs "$EPOCHS" \
        --seed "$SEED" --resume auto $FLAGS
}

data() {
    case $DATA in cifar10 | cifar100) "$PYTHON" -m dataset.download "$DATA" --img_root "$IMG_ROOT" ;; esac
}

# The teacher, and the student without a teacher.
base() {
    run train_base.py --net_name "$T_NAME" --note "$T_RUN"
    run train_base.py --net_name "$S_NAME" --note "$S_RUN"
}

# Students in one process: same batches, one teacher forward, same initial weights as the baseline.
kd() {
    run train_kd.py --kd_mode "$@" --t_name "$T_NAME" --t_model "$SAVE_ROOT/$T_RUN/net.pt" \
        --s_name "$S_NAME" --s_init "$SAVE_ROOT/$S_RUN/initial.pt" --note "$KD_RUN"
}

# One block per method, the weight spelled out: the seed zoo's, in its order, then later methods.
logits() { kd logits --lambda_kd 0.1; }
st()     { kd st     --lambda_kd 0.1; }
at()     { kd at     --lambda_kd 1000; }
fitnet() { kd fitnet --lambda_kd 0.1; }
nst()    { kd nst    --lambda_kd 10; }
pkt()    { kd pkt    --lambda_kd 10000; }
rkd()    { kd rkd    --lambda_kd 1.0; }
sp()     { kd sp     --lambda_kd 3000; }
cc()     { kd cc     --lambda_kd 100; }
vid()    { kd vid    --lambda_kd 1.0; }
ofd()    { kd ofd    --lambda_kd 0.5; }
afd()    { kd afd    --lambda_kd 500; }
crd()    { kd crd    --lambda_kd 0.2; }
irg()    { kd irg    --lambda_kd 1.0; }
kdsvd()  { kd kdsvd  --lambda_kd 1.0; }
dkd()    { kd dkd    --lambda_kd 1.0; }
dist()   { kd dist   --lambda_kd 2.0; }
nkd()    { kd nkd    --lambda_kd 1.0; }
wsld()   { kd wsld   --lambda_kd 2.25; }
ttm()    { kd ttm    --lambda_kd 45; }
lskd()   { kd lskd   --lambda_kd 9; }
ickd()   { kd ickd   --lambda_kd 2.5; }
mgd()    { kd mgd    --lambda_kd 0.0012; }
mlkd()   { kd mlkd   --lambda_kd 0.9; }
srrl()   { kd srrl   --lambda_kd 1.0; }
ofakd()  { kd ofakd  --lambda_kd 1.0; }
sdd()    { kd sdd    --lambda_kd 0.9; }
cd_()    { kd cd     --lambda_kd 18; }
pad()    { kd pad    --lambda_kd 1.0; }
ikd()    { kd ikd    --lambda_kd 0.2; }
eel()    { kd eel    --lambda_kd 1.0; }
reviewkd() { kd reviewkd --lambda_kd 0.6; }
METHODS='logits st at fitnet nst pkt rkd sp cc vid ofd afd crd irg kdsvd dkd dist nkd wsld ttm lskd ickd mgd'
METHODS="$METHODS mlkd srrl ofakd reviewkd sdd cd pad ikd eel"

table() {
    "$PYTHON" tools/table.py "$SAVE_ROOT/$T_RUN" "$SAVE_ROOT/$S_RUN" "$SAVE_ROOT/$KD_RUN" --out "$SAVE_ROOT/$KD_RUN"
}

# Everything on the embedded data set with a short schedule, sized for two CPU cores.
quick() {
    DATA=shapes:5000 T_NAME=resnet20 S_NAME=resnet8 EPOCHS=9 SAVE_ROOT=$SAVE_ROOT/quick
    T_RUN=teacher S_RUN=baseline KD_RUN=kd
    FLAGS="--batch_size 64 --milestones 0.6 0.85 $FLAGS"
    base
    kd st at sp
    table
}

# ----------------------------------------------------------------------------------------------------- main

usage="say quick, cifar10, cifar100, base, kd METHOD..., or one of: $METHODS"
command=${1:-}
case " quick cifar10 cifar100 base kd $METHODS " in
*" ${command:-nothing} "*) ;;
*)
    case $command in
    -h | --help) sed -n '2,/^set /{/^#/p}' "$0" | sed 's/^# \{0,1\}//'; exit ;;
    *) echo "example_train_script.sh: error: ${command:-nothing to do}: $usage" >&2; exit 2 ;;
    esac ;;
esac
shift
choose_python
case $command in
cifar10 | cifar100)
    DATA=$command
    names
    data
    base
    kd $METHODS
    table ;;
base)
    data
    base ;;
kd)
    kd "$@"
    table ;;
cd) cd_ ;;    # cd is the shell's own word
*) "$command" ;;
esac
