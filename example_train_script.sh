#!/usr/bin/env bash
# The recipe book: every command that trains something, runnable as a whole or by block.
#
#   bash example_train_script.sh quick        embedded data, CPU, a few minutes: teacher, students, table, figure
#   bash example_train_script.sh cifar10      CIFAR-10: get the data, base networks, every method, table, figure
#   bash example_train_script.sh cifar100     the same on CIFAR-100
#   bash example_train_script.sh base         ... only the teacher and the baseline
#   bash example_train_script.sh kd AT ...    ... only these methods, e.g. kd at rkd st+pkt
#   bash example_train_script.sh dml [NAME..] ... only these methods for networks that learn from each other
#   bash example_train_script.sh table NAME   a table of results/grid.json, e.g. kd-zoo-cifar10: train what
#                                             results/ lacks of it, then write its table.md
#   bash example_train_script.sh ka           amalgamation: teachers of class parts, rooms, tables, figures
#   bash example_train_script.sh METHOD       ... the block of one method
#   bash example_train_script.sh --dry-run quick      print the commands instead of running them
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
GROUP=${GROUP:-8}                 # students per process: they share batches and the teacher's forward
RETRAIN=${RETRAIN:-}              # 1: train also what results/ holds already
PARTS=${PARTS:-2}                 # ka: teachers, each with its part of the classes
SPLIT=${SPLIT:-contiguous}        # ka: which classes go together: contiguous, interleaved, random
KA_EPOCHS=${KA_EPOCHS:-100}       # ka: epochs of the students
KA_FLAGS=${KA_FLAGS:-}            # ka: anything else for train_ka.py
ROOM_EPOCHS=${ROOM_EPOCHS:-10}    # ka: epochs on the rooms, and half as many of fine-tuning
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
    DML_RUN=$DATA-$S_NAME-s$SEED
    KA_RUN=ka-$DATA-$PARTS-$T_NAME-$S_NAME-s$SEED
    ROOM_RUN=ka-rooms-s$SEED
}
names

py() {    # or, with --dry-run, only what would be run
    if [ -n "${DRY_RUN:-}" ]; then echo "python$(printf ' %q' "$@")"; else "$PYTHON" "$@"; fi
}

run() {    # a training script with the common flags
    # shellcheck disable=SC2086  # FLAGS is several words on purpose
    py "$@" --data_name "$DATA" --img_root "$IMG_ROOT" --save_root "$SAVE_ROOT" --epochs "$EPOCHS" \
        --seed "$SEED" --resume auto $FLAGS
}

data() {
    case $DATA in cifar10 | cifar100) py -m dataset.download "$DATA" --img_root "$IMG_ROOT" ;; esac
}

# The teacher, and the student without a teacher.
base() {
    run train_base.py --net_name "$T_NAME" --note "$T_RUN"
    run train_base.py --net_name "$S_NAME" --note "$S_RUN"
}

# Students in one process: same batches, one teacher forward, same initial weights as the baseline. What lies in
# results/ with the same recipe is not trained again, unless RETRAIN=1.
kd() {
    local methods=() flags=()
    while [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; do methods+=("$1"); shift; done
    flags=(--t_name "$T_NAME" --t_model "$SAVE_ROOT/$T_RUN/net.pt" --s_name "$S_NAME"
        --s_init "$SAVE_ROOT/$S_RUN/initial.pt" --note "$KD_RUN" "$@")
    # shellcheck disable=SC2207  # method names hold no spaces
    methods=($(missing train_kd.py "${methods[*]}" "${flags[@]}"))
    if [ ${#methods[@]} -gt 0 ]; then run train_kd.py --kd_mode "${methods[@]}" "${flags[@]}"; fi
}

missing() {    # of these methods, those without a result
    local script=$1 methods=$2
    shift 2
    if [ -n "${DRY_RUN:-}${RETRAIN:-}" ] || [ ! -d results ]; then echo "$methods"; return; fi
    # shellcheck disable=SC2086
    "$PYTHON" tools/missing.py $methods -- "$script" "$@" --data_name "$DATA" --epochs "$EPOCHS" --seed "$SEED" $FLAGS
}

# Networks that learn from each other.
peers() {
    local method=$1 weight=$2
    shift 2
    local flags=(--lambda_kd "$weight" --net_names "$@" --note "$method-$DML_RUN")
    if [ -n "$(missing train_dml.py "$method" "${flags[@]}")" ]; then
        run train_dml.py --kd_mode "$method" "${flags[@]}"
    fi
}

# methods:begin (python -m report refresh)
# A frozen teacher and a student.
ab()         { kd ab          --lambda_kd 10; }
adain()      { kd adain       --lambda_kd 1; }
afd()        { kd afd         --lambda_kd 500; }
at()         { kd at          --lambda_kd 1000; }
bss()        { kd bss         --lambda_kd 2; }
catkd()      { kd catkd       --lambda_kd 0.7; }
cc()         { kd cc          --lambda_kd 100; }
cd_()        { kd cd          --lambda_kd 18; }
cd_edt()     { kd cd_edt      --lambda_kd 18; }
crd()        { kd crd         --lambda_kd 0.2; }
ctkd()       { kd ctkd        --lambda_kd 0.9; }
dgkd()       { kd dgkd        --lambda_kd 1; }
dist()       { kd dist        --lambda_kd 2; }
dkd()        { kd dkd         --lambda_kd 1; }
dot()        { kd dot         --lambda_kd 0.9; }
eel()        { kd eel         --lambda_kd 1; }
fcfd()       { kd fcfd        --lambda_kd 1; }
fitnet()     { kd fitnet      --lambda_kd 0.1; }
fsp()        { kd fsp         --lambda_kd 1; }
ft()         { kd ft          --lambda_kd 200; }
ickd()       { kd ickd        --lambda_kd 2.5; }
ikd()        { kd ikd         --lambda_kd 0.2; }
irg()        { kd irg         --lambda_kd 1; }
kdsvd()      { kd kdsvd       --lambda_kd 1; }
logits()     { kd logits      --lambda_kd 0.1; }
lskd()       { kd lskd        --lambda_kd 9; }
lwm()        { kd lwm         --lambda_kd 0.4; }
mgd()        { kd mgd         --lambda_kd 0.0012; }
mhgd()       { kd mhgd        --lambda_kd 1; }
mlkd()       { kd mlkd        --lambda_kd 0.9; }
mlkd_strong() { kd mlkd_strong --lambda_kd 0.9; }
nkd()        { kd nkd         --lambda_kd 1; }
norm()       { kd norm        --lambda_kd 1; }
nst()        { kd nst         --lambda_kd 10; }
ofakd()      { kd ofakd       --lambda_kd 1; }
ofd()        { kd ofd         --lambda_kd 0.5; }
pad()        { kd pad         --lambda_kd 1; }
pkt()        { kd pkt         --lambda_kd 10000; }
quest()      { kd quest       --lambda_kd 1; }
reviewkd()   { kd reviewkd    --lambda_kd 0.6; }
rkd()        { kd rkd         --lambda_kd 1; }
sdd()        { kd sdd         --lambda_kd 0.9; }
semckd()     { kd semckd      --lambda_kd 400; }
simkd()      { kd simkd       --lambda_kd 1; }
sobolev()    { kd sobolev     --lambda_kd 20; }
sp()         { kd sp          --lambda_kd 3000; }
srrl()       { kd srrl        --lambda_kd 1; }
st()         { kd st          --lambda_kd 0.1; }
tfkd_self()  { T_NAME=$S_NAME T_RUN=$S_RUN kd tfkd_self --lambda_kd 1; }
ttm()        { kd ttm         --lambda_kd 45; }
vid()        { kd vid         --lambda_kd 1; }
vkd()        { kd vkd         --lambda_kd 1; }
wsld()       { kd wsld        --lambda_kd 2.25; }

# The student teaches itself: these need no teacher.
byot()       { kd byot        --lambda_kd 1; }
cskd()       { kd cskd        --lambda_kd 1; }
ddgsd()      { kd ddgsd       --lambda_kd 1; }
dlb()        { kd dlb         --lambda_kd 1; }
pskd()       { kd pskd        --lambda_kd 1; }
sad()        { kd sad         --lambda_kd 0.1; }
sla()        { kd sla         --lambda_kd 1; }
tfkd()       { kd tfkd        --lambda_kd 1; }
uskd()       { kd uskd        --lambda_kd 1; }

# Networks that learn from each other.
dcm()        { peers dcm         1 "$S_NAME" "$S_NAME"; }
dml()        { peers dml         1 "$S_NAME" "$S_NAME"; }
kdcl()       { peers kdcl        1 "$S_NAME" "$S_NAME"; }
okddip()     { peers okddip      1 "$S_NAME" "$S_NAME" "$S_NAME" "$S_NAME"; }
onadvfd()    { peers onadvfd     1 "$S_NAME" "$S_NAME"; }
one()        { peers one         1 "$S_NAME" "$S_NAME" "$S_NAME"; }

METHODS='ab adain afd at bss byot catkd cc cd cd_edt crd cskd ctkd ddgsd dgkd dist dkd dlb dot eel fcfd fitnet fsp ft ickd ikd irg kdsvd logits lskd lwm mgd mhgd mlkd mlkd_strong nkd norm nst ofakd ofd pad pkt pskd quest reviewkd rkd sad sdd semckd simkd sla sobolev sp srrl st tfkd tfkd_self ttm uskd vid vkd wsld'
PEERS='dcm dml kdcl okddip onadvfd one'
# methods:end

# Amalgamation: teachers that know a part of the classes each, students that know them all and read no label.
ka() {
    part_teachers
    amalgamate
    ka_report "$KA_RUN"
}

part_teachers() {
    local part
    for part in $(seq 0 $((PARTS - 1))); do
        run train_base.py --net_name "$T_NAME" --num_parts "$PARTS" --split "$SPLIT" --part "$part" \
            --note "$KA_RUN-teacher$part"
    done
}

amalgamate() {
    local part models=()
    for part in $(seq 0 $((PARTS - 1))); do models+=("$SAVE_ROOT/$KA_RUN-teacher$part/net.pt"); done
    # shellcheck disable=SC2086  # KA_MODES and KA_FLAGS are several words
    EPOCHS=$KA_EPOCHS run train_ka.py --ka_mode $KA_MODES --t_name "$T_NAME" --t_model "${models[@]}" \
        --s_name "$S_NAME" --split "$SPLIT" --note "$KA_RUN" $KA_FLAGS
}

# Three teachers of one dense task each, then one network for all three.
rooms() {
    local task models=() flags=(--batch_size 32 --lr 2e-3)
    for task in seg depth normal; do
        models+=("$SAVE_ROOT/$ROOM_RUN-$task/scratch/student.pt")
        DATA=$ROOMS EPOCHS=$ROOM_EPOCHS run train_ka.py --ka_mode scratch --tasks "$task" --epochs_ft 0 \
            --note "$ROOM_RUN-$task" "${flags[@]}"
    done
    DATA=$ROOMS EPOCHS=$ROOM_EPOCHS run train_ka.py --ka_mode sbm scratch --t_model "${models[@]}" \
        --epochs_ft $((ROOM_EPOCHS / 2)) --note "$ROOM_RUN" "${flags[@]}"
    ka_report "$ROOM_RUN"
}

ka_report() {
    py -m report ka "$SAVE_ROOT/$1" --out "$SAVE_ROOT/$1"
    py -m report figures "$SAVE_ROOT/$1" --out "$SAVE_ROOT/$1"
}
KA_MODES='concat parts mse layerwise cfl soka customize_target scratch'
ROOMS=scenes

# All methods, in processes of GROUP students.
every_method() {
    local group=()
    for method in $METHODS; do
        if [ "$method" = tfkd_self ]; then continue; fi    # has another teacher, below
        group+=("$method")
        if [ ${#group[@]} = "$GROUP" ]; then kd "${group[@]}"; group=(); fi
    done
    if [ ${#group[@]} -gt 0 ]; then kd "${group[@]}"; fi
    tfkd_self
    for method in $PEERS; do "$method"; done
}

table() {
    local peers=()
    for method in $PEERS; do
        if [ -d "$SAVE_ROOT/$method-$DML_RUN" ]; then peers+=("$SAVE_ROOT/$method-$DML_RUN"); fi
    done
    py -m report table "$SAVE_ROOT/$T_RUN" "$SAVE_ROOT/$S_RUN" "$SAVE_ROOT/$KD_RUN" ${peers[@]+"${peers[@]}"} \
        --out "$SAVE_ROOT/$KD_RUN"
}

# A published table: recipe, weights and arguments of every row are in results/grid.json. NAME also means all
# tables whose names begin with NAME-, so kd-zoo-cifar10 is three pairs' tables, mdistiller-cifar100 eleven.
rerun() {
    case $1 in
    *cifar100*) DATA=cifar100 ;;
    *cifar10*) DATA=cifar10 ;;
    *) DATA=folder ;;
    esac
    data
    py tools/reproduce.py --only "$1" --table --img_root "$IMG_ROOT" --save_root "$SAVE_ROOT/reproduce"
}

# A first look, on the embedded data set with a short schedule, sized for two CPU cores.
quick() {
    DATA=shapes:5000 T_NAME=resnet20 S_NAME=resnet8 EPOCHS=5 SAVE_ROOT=$SAVE_ROOT/quick
    T_RUN=teacher S_RUN=baseline KD_RUN=kd
    FLAGS="--batch_size 32 --schedule onecycle --lr 0.05 $FLAGS"
    say 'Ten kinds of shapes, rendered here, 5000 images to learn from: a few minutes in all. What is done stays;' \
        'interrupted, the same command continues.'
    say '1 of 5  A larger network, resnet20, learns from labels. It will be the teacher.'
    run train_base.py --net_name "$T_NAME" --note "$T_RUN"
    say '2 of 5  A small network, resnet8, learns from labels alone. This is what distillation has to beat.'
    run train_base.py --net_name "$S_NAME" --note "$S_RUN"
    say '3 of 5  The same small network, from the same initial weights, learns from labels and the teacher, in three' \
        'ways: st (the softened outputs), at (attention maps), sp (similarities between images).'
    kd st at sp

    # two teachers with half of the shapes each, students that know all ten
    say '4 of 5  Knowledge amalgamation: two teachers that know five shapes each.'
    PARTS=2 SPLIT=contiguous KA_RUN=amalgamated
    EPOCHS=10 part_teachers
    say '5 of 5  Small networks learn all ten shapes from these two teachers without a single label: concat (their' \
        'outputs), layerwise (their maps). scratch is the reference: it gets all labels.'
    KA_MODES='concat layerwise scratch' KA_EPOCHS=7 KA_FLAGS="--optim sgd"
    amalgamate
    say 'What came out, accuracy on 1250 new images after the last epoch:'
    py -m report overview "$SAVE_ROOT"
}

say() {    # a heading for who watches
    if [ -n "${DRY_RUN:-}" ]; then echo "# $*"; else printf '\n%s\n\n' "$*" | fold -s -w 100; fi
}

# ----------------------------------------------------------------------------------------------------- main

if [ "${1:-}" = --dry-run ]; then DRY_RUN=1; shift; fi
usage="say quick, cifar10, cifar100, base, kd METHOD..., dml [METHOD...], table NAME, ka, rooms, or one of: $METHODS $PEERS"
command=${1:-}
case " quick cifar10 cifar100 base kd table ka rooms $METHODS $PEERS " in
*" ${command:-nothing} "*) ;;
*)
    case $command in
    -h | --help) sed -n '2,/^set /{/^#/p}' "$0" | sed 's/^# \{0,1\}//'; exit ;;
    *) echo "example_train_script.sh: error: ${command:-nothing to do}: $usage" >&2; exit 2 ;;
    esac ;;
esac
shift
if [ "$command" = table ] && [ $# != 1 ]; then
    echo 'example_train_script.sh: error: say table NAME, a name of results/grid.json' >&2; exit 2
fi
if [ -z "${DRY_RUN:-}" ]; then choose_python; fi
case $command in
cifar10 | cifar100)
    DATA=$command
    names
    data
    base
    every_method
    table ;;
base)
    data
    base ;;
kd)
    kd "$@"
    table ;;
dml)
    for method in ${@:-dml}; do
        case " $PEERS " in
        *" $method "*) "$method" ;;
        *) echo "example_train_script.sh: error: dml $method: say one of $PEERS" >&2; exit 2 ;;
        esac
    done ;;
table) rerun "$1" ;;
cd) cd_ ;;    # cd is the shell's own word
ka)
    data
    ka
    rooms ;;
*) "$command" ;;
esac
