#!/usr/bin/env bash
# The recipe book: every command that trains something, runnable as a whole or by block.
#
#   bash example_train_script.sh quick        embedded data, CPU, a few minutes: teacher, students, table, figure
#   bash example_train_script.sh cifar10      CIFAR-10: get the data, base networks, every method (but vitkd, which
#                                             needs vision transformers), table, figure: resnet110 and some
#                                             hundred students of 200 epochs, days of a GPU
#   bash example_train_script.sh cifar100     the same on CIFAR-100
#   bash example_train_script.sh base         ... only the data, the teacher and the baseline
#   bash example_train_script.sh kd at rkd    ... only these methods, after base; + joins two: st+pkt
#   bash example_train_script.sh dml [NAME..] ... only these methods for networks that learn from each other
#   bash example_train_script.sh table NAME   a table of results/grid.json, e.g. kd-zoo-cifar10: train what
#                                             results/ lacks of it, then write its table.md
#   bash example_train_script.sh dfkd         without data: teacher, then students from images that are made
#   bash example_train_script.sh ka           amalgamation: class parts, then rooms, faces and ka_tools, with tables
#                                             and figures, hours on a CPU
#   bash example_train_script.sh rooms        ... or faces: these alone
#   bash example_train_script.sh ka_claims    ... its methods side by side over seeds, half of CIFAR-10, hours on a CPU
#   bash example_train_script.sh ka_tools     ... its losses with a trainer of their own, embedded data, CPU
#   bash example_train_script.sh lm           language models on Python's own reference, CPU, a few minutes
#   bash example_train_script.sh dense        segmentation and detection of embedded rooms, CPU, a few minutes
#   bash example_train_script.sh METHOD       the block of one method with its weight, after base
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
A_NAME=${A_NAME:-resnet56}        # second teacher, for methods that take several
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
FACES=${FACES:-faces:1000}       # ka: faces, faces:N or celeba; the defaults of FACE_ are for two CPU cores
FACE_EPOCHS=${FACE_EPOCHS:-12}    # ka: epochs on the faces: sources, streams, backbones
FACE_KA_EPOCHS=${FACE_KA_EPOCHS:-24} # ka: of customized students
FACE_SIZE=${FACE_SIZE:-24}        # ka: side of the images
FACE_NET=${FACE_NET:-resnet8}     # ka: their networks, and of one wider teacher:
WIDE_NET=${WIDE_NET:-wrn_10_2}
LM_MODES=${LM_MODES:-ce fkl gkd gkd_01 distillm rkl}    # lm: methods
TEXT=${TEXT:-pydoc}               # lm: pydoc, markov or a file
SEG_MODES=${SEG_MODES:-alone st cwd ifvd}        # dense: methods of segmentation
DET_MODES=${DET_MODES:-alone pkd}                # dense: of detection
DFKD_DATA=${DFKD_DATA:-patterns}  # dfkd: the teacher's data, whose images are not used
DFKD_MODES=${DFKD_MODES:-dafl dfad fastdfkd}    # dfkd: which methods
DFKD_FLAGS=${DFKD_FLAGS:-}        # dfkd: more flags, for each of them
FLAGS=${FLAGS:-}                  # anything else for the training scripts, e.g. '--amp bf16'
FAILED=                           # 1 once a training ended with exit code 1

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
    A_RUN=base-$DATA-$A_NAME-s$SEED
    S_RUN=base-$DATA-$S_NAME-s$SEED
    KD_RUN=kd-$DATA-$T_NAME-$S_NAME-s$SEED
    DML_RUN=$DATA-$S_NAME-s$SEED
    KA_RUN=ka-$DATA-$PARTS-$T_NAME-$S_NAME-s$SEED
    ROOM_RUN=ka-rooms-s$SEED
    FACE_RUN=ka-${FACES%%:*}-s$SEED
    TOOL_RUN=ka-tools-s$SEED
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

# A method whose loss became inf or NaN, or a group too large for the GPU's memory, has no result (exit code 1); the
# other commands follow, and the script ends with 1.
attempt() {
    local code=0
    run "$@" || code=$?
    case $code in 0) ;; 1) FAILED=1 ;; *) exit "$code" ;; esac
}

data() {
    local name=${DATA%%:*}    # cifar10:25000 is a part of cifar10
    case $name in cifar10 | cifar100) py -m dataset.download "$name" --img_root "$IMG_ROOT" ;; esac
}

# The teacher, and the student without a teacher.
base() {
    run train_base.py --net_name "$T_NAME" --note "$T_RUN"
    run train_base.py --net_name "$S_NAME" --note "$S_RUN"
}

# Into OWN: these flags without what they say of methods that are trained elsewhere or not again, which train_kd.py
# would refuse. METHODS FLAG...; ASKED is every method of the command.
own_flags() {
    local mine=" ${1//+/ } " of_methods='' empty='' word name
    OWN=()
    shift
    for word in "$@"; do
        case $word in
        --*)
            if [ -n "$empty" ]; then OWN+=("$empty"); fi    # train_kd.py says that its value is missing
            of_methods='' empty='' ;;
        esac
        case $word in --lambda[-_]kd | --kd[-_]args | --kd[-_]layers) of_methods=$word empty=$word; continue ;; esac
        empty=''
        name=${word%%[.=]*}
        if [ -n "$of_methods" ]; then
            case $mine in *" $name "*) ;; *) case " ${ASKED//+/ } " in *" $name "*) continue ;; esac ;; esac
            if [ "$of_methods" != said ]; then OWN+=("$of_methods"); of_methods=said; fi
        fi
        OWN+=("$word")
    done
    if [ -n "$empty" ]; then OWN+=("$empty"); fi
}

# Students in one process: same batches, one teacher forward, same initial weights as the baseline. What lies in
# results/ with the same recipe is not trained again, unless RETRAIN=1.
kd() {
    local methods=() flags=() second=(${SECOND:+"$A_NAME"})
    while [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; do methods+=("$1"); shift; done
    flags=(--t_name "$T_NAME" ${second[@]+"${second[@]}"}
        --t_model "$SAVE_ROOT/$T_RUN/net.pt" ${second[@]+"$SAVE_ROOT/$A_RUN/net.pt"} --s_name "$S_NAME"
        --s_init "$SAVE_ROOT/$S_RUN/initial.pt" --note "$KD_RUN" "$@")
    local asked="${methods[*]}"
    local ASKED=${ASKED-$asked}
    own_flags "$asked" "${flags[@]}"
    # shellcheck disable=SC2207  # method names hold no spaces
    methods=($(missing train_kd.py "$asked" "${OWN[@]}"))
    if [ "$asked" != "${methods[*]-}" ]; then
        echo "results/ holds some of: $asked (RETRAIN=1 trains them again); to train: ${methods[*]:-none}" >&2
    fi
    if [ ${#methods[@]} -gt 0 ]; then
        own_flags "${methods[*]}" "${flags[@]}"
        attempt train_kd.py --kd_mode "${methods[@]}" "${OWN[@]}"
    fi
}

# Methods that take several teachers: the teacher and a second network.
team() {
    run train_base.py --net_name "$A_NAME" --note "$A_RUN"
    SECOND=1 kd "$@"
}

# Any of both kinds, also joined by +.
chosen() {
    local alone=() several=() methods=() method part where
    while [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; do methods+=("$1"); shift; done    # then flags
    local ASKED="${methods[*]}"
    for method in "${methods[@]}"; do
        # its teacher is the student's twin
        if [ "$method" = tfkd_self ]; then T_NAME=$S_NAME T_RUN=$S_RUN kd tfkd_self "$@"; continue; fi
        where=alone
        for part in ${method//+/ }; do case " $TEAMS " in *" $part "*) where=several ;; esac; done
        if [ $where = several ]; then several+=("$method"); else alone+=("$method"); fi
    done
    if [ ${#alone[@]} -gt 0 ]; then kd "${alone[@]}" "$@"; fi
    if [ ${#several[@]} -gt 0 ]; then team "${several[@]}" "$@"; fi
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
    local todo flags=(--lambda_kd "$weight" --net_names "$@" --note "$method-$DML_RUN")
    todo=$(missing train_dml.py "$method" "${flags[@]}")    # a line of its own, so that its failure is the script's
    if [ -n "$todo" ]; then
        attempt train_dml.py --kd_mode "$method" "${flags[@]}"
    fi
}

# methods:begin (python -m report refresh)
# A frozen teacher and a student.
ab()         { kd ab          --lambda_kd 10; }
abkd()       { kd abkd        --lambda_kd 32; }
adain()      { kd adain       --lambda_kd 1; }
aekd()       { team aekd      --lambda_kd 0.9; }
afd()        { kd afd         --lambda_kd 500; }
akl()        { kd akl         --lambda_kd 0.5; }
at()         { kd at          --lambda_kd 1000; }
bss()        { kd bss         --lambda_kd 2; }
camkd()      { team camkd     --lambda_kd 1; }
catkd()      { kd catkd       --lambda_kd 0.7; }
cc()         { kd cc          --lambda_kd 100; }
cd_()        { kd cd          --lambda_kd 18; }
cd_edt()     { kd cd_edt      --lambda_kd 18; }
clipkd()     { kd clipkd      --lambda_kd 1; }
crd()        { kd crd         --lambda_kd 0.2; }
crld()       { kd crld        --lambda_kd 1; }
ctkd()       { kd ctkd        --lambda_kd 0.9; }
dcd()        { kd dcd         --lambda_kd 1; }
deit()       { kd deit        --lambda_kd 1; }
diffkd()     { kd diffkd      --lambda_kd 1; }
deep_geometric_graphs() { kd deep_geometric_graphs --lambda_kd 25; }
dgkd()       { team dgkd      --lambda_kd 1; }
dist()       { kd dist        --lambda_kd 2; }
distillm()   { kd distillm    --lambda_kd 1; }
distplus()   { kd distplus    --lambda_kd 2; }
dkd()        { kd dkd         --lambda_kd 1; }
dkl()        { kd dkl         --lambda_kd 1; }
dkl_gkl()    { kd dkl_gkl     --lambda_kd 1; }
dot()        { kd dot         --lambda_kd 0.9; }
eakd()       { kd eakd        --lambda_kd 0.9; }
ebkd()       { team ebkd      --lambda_kd 1; }
eel()        { kd eel         --lambda_kd 1; }
fcfd()       { kd fcfd        --lambda_kd 1; }
fdistill_tvd() { kd fdistill_tvd --lambda_kd 1; }
fitnet()     { kd fitnet      --lambda_kd 0.1; }
fkd_labels() { kd fkd_labels  --lambda_kd 1; }
fkd_labels_strong() { kd fkd_labels_strong --lambda_kd 1; }
fsp()        { kd fsp         --lambda_kd 1; }
ft()         { kd ft          --lambda_kd 200; }
gkd()        { kd gkd         --lambda_kd 1; }
graftkd()    { kd graftkd     --lambda_kd 1; }
ickd()       { kd ickd        --lambda_kd 2.5; }
ikd()        { kd ikd         --lambda_kd 0.2; }
irg()        { kd irg         --lambda_kd 1; }
kdsvd()      { kd kdsvd       --lambda_kd 1; }
logits()     { kd logits      --lambda_kd 0.1; }
lskd()       { kd lskd        --lambda_kd 9; }
lwm()        { kd lwm         --lambda_kd 0.4; }
mgd()        { kd mgd         --lambda_kd 0.0012; }
mhgd()       { kd mhgd        --lambda_kd 1; }
minillm_rkl() { kd minillm_rkl --lambda_kd 1; }
mkd_avg()    { team mkd_avg   --lambda_kd 1; }
mlkd()       { kd mlkd        --lambda_kd 0.9; }
mlkd_strong() { kd mlkd_strong --lambda_kd 0.9; }
nkd()        { kd nkd         --lambda_kd 1; }
norm()       { kd norm        --lambda_kd 1; }
nst()        { kd nst         --lambda_kd 10; }
ofakd()      { kd ofakd       --lambda_kd 1; }
ofd()        { kd ofd         --lambda_kd 0.5; }
pad()        { kd pad         --lambda_kd 1; }
pkt()        { kd pkt         --lambda_kd 10000; }
pld()        { kd pld         --lambda_kd 1; }
quest()      { kd quest       --lambda_kd 1; }
reviewkd()   { kd reviewkd    --lambda_kd 0.6; }
rkd()        { kd rkd         --lambda_kd 1; }
rld()        { kd rld         --lambda_kd 1; }
rrd()        { kd rrd         --lambda_kd 1; }
rsd()        { kd rsd         --lambda_kd 0.1; }
scalekd()    { kd scalekd     --lambda_kd 2; }
sakd()       { kd sakd        --lambda_kd 1; }
sdb()        { kd sdb         --lambda_kd 1; }
sdb_student() { kd sdb_student --lambda_kd 1; }
sdd()        { kd sdd         --lambda_kd 0.9; }
semckd()     { kd semckd      --lambda_kd 400; }
simkd()      { kd simkd       --lambda_kd 1; }
skd()        { kd skd         --lambda_kd 1; }
sobolev()    { kd sobolev     --lambda_kd 20; }
sortkd()     { kd sortkd      --lambda_kd 0.9; }
sp()         { kd sp          --lambda_kd 3000; }
srd()        { kd srd         --lambda_kd 1; }
srrl()       { kd srrl        --lambda_kd 1; }
sskd()       { kd sskd        --lambda_kd 1; }
st()         { kd st          --lambda_kd 0.1; }
taid()       { kd taid        --lambda_kd 1; }
tekap()      { kd tekap       --lambda_kd 0.9; }
tdd()        { kd tdd         --lambda_kd 0.1; }
tfkd_self()  { T_NAME=$S_NAME T_RUN=$S_RUN kd tfkd_self --lambda_kd 1; }
ttm()        { kd ttm         --lambda_kd 45; }
vid()        { kd vid         --lambda_kd 1; }
vitkd()      { kd vitkd       --lambda_kd 1; }
vkd()        { kd vkd         --lambda_kd 1; }
wkd()        { kd wkd         --lambda_kd 1; }
wkd_feature() { kd wkd_feature --lambda_kd 0.08; }
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

METHODS='ab abkd adain aekd afd akl at bss byot camkd catkd cc cd cd_edt clipkd crd crld cskd ctkd dcd ddgsd deit diffkd deep_geometric_graphs dgkd dist distillm distplus dkd dkl dkl_gkl dlb dot eakd ebkd eel fcfd fdistill_tvd fitnet fkd_labels fkd_labels_strong fsp ft gkd graftkd ickd ikd irg kdsvd logits lskd lwm mgd mhgd minillm_rkl mkd_avg mlkd mlkd_strong nkd norm nst ofakd ofd pad pkt pld pskd quest reviewkd rkd rld rrd rsd sad scalekd sakd sdb sdb_student sdd semckd simkd skd sla sobolev sortkd sp srd srrl sskd st taid tekap tdd tfkd tfkd_self ttm uskd vid vitkd vkd wkd wkd_feature wsld'
TEAMS='aekd camkd dgkd ebkd mkd_avg'
VITS='vitkd'
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
    for part in $(seq 0 $((PARTS - 1))); do part_teacher "$part"; done
}

part_teacher() {
    run train_base.py --net_name "$T_NAME" --num_parts "$PARTS" --split "$SPLIT" --part "$1" \
        --note "$KA_RUN-teacher$1"
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

# Attributes of faces: sources that share one attribute, a component for each, one network for both; multi-label
# teachers in one network with a stream for each; one backbone for teachers of different tasks and widths.
faces() {
    local a=Bangs,Smiling,Wearing_Hat b=Bangs,Pale_Skin c=Eyeglasses,Goatee,Oval_Face d=Eyeglasses,Bushy_Eyebrows
    learn_face source1 scratch "$a"
    learn_face source2 scratch "$b"
    learn_face source3 scratch "$c"
    learn_face source4 scratch "$d"
    FACE_EPOCHS=$FACE_KA_EPOCHS learn_face bangs customize Bangs \
        "$FACE_NET" source1/scratch "$a" "$FACE_NET" source2/scratch "$b"
    FACE_EPOCHS=$FACE_KA_EPOCHS learn_face eyeglasses customize Eyeglasses \
        "$FACE_NET" source3/scratch "$c" "$FACE_NET" source4/scratch "$d"
    FACE_EPOCHS=$FACE_KA_EPOCHS learn_face both 'customize_target each_attribute scratch' Bangs,Eyeglasses \
        "$FACE_NET" bangs/customize Bangs "$FACE_NET" eyeglasses/customize Eyeglasses
    learn_face streams 'afk each_attribute scratch' "$a,$c" \
        "$FACE_NET" source1/scratch "$a" "$FACE_NET" source3/scratch "$c"
    FACE_STUDENT=$WIDE_NET learn_face wide scratch "$c"
    learn_face backbone 'radio unic scratch' '' \
        "$FACE_NET" source1/scratch "$a" "$WIDE_NET" wide/scratch "$c"
    py -m report ka "$SAVE_ROOT/$FACE_RUN" --out "$SAVE_ROOT/$FACE_RUN"
}

# The claims: each method with halves, quarters and unlike teachers of CIFAR-10, three seeds, half of the images.
ka_claims() {
    DATA=cifar10:25000
    data
    for SEED in 1 2 3; do
        claim halves resnet8:2:0 resnet8:2:1
        claim quarters resnet8:4:0 resnet8:4:1 resnet8:4:2 resnet8:4:3
        claim unlike wrn_16_1:2:0 resnet8:2:1
    done
    py -m report ka "$SAVE_ROOT/ka-claims" --out "$SAVE_ROOT/ka-claims"
}

# SETTING, then of every teacher its name, the number of parts, and its part.
claim() {
    local setting=$1 teacher name parts part note nets=() models=()
    shift
    for teacher in "$@"; do
        IFS=: read -r name parts part <<< "$teacher"
        note=ka-claims-teacher-$name-$parts-$part-s$SEED
        EPOCHS=12 run train_base.py --net_name "$name" --num_parts "$parts" --part "$part" --note "$note" \
            --schedule onecycle --lr 0.3
        nets+=("$name")
        models+=("$SAVE_ROOT/$note/net.pt")
    done
    # shellcheck disable=SC2086  # KA_MODES is several words
    EPOCHS=6 run train_ka.py --ka_mode $KA_MODES --t_name "${nets[@]}" --t_model "${models[@]}" --s_name resnet8 \
        --note "ka-claims/$setting-s$SEED"
}

# NOTE MODES ATTRIBUTES, then of every teacher its name, its file and its attributes.
learn_face() {
    local note=$1 modes=$2 wanted=$3 nets=() models=() lists=()
    local flags=(--size "$FACE_SIZE" --batch_size 32 --schedule onecycle --lr 4e-3)
    shift 3
    while [ $# -gt 0 ]; do
        nets+=("$1") models+=("$SAVE_ROOT/$FACE_RUN/$2/student.pt") lists+=("$3")
        shift 3
    done
    if [ ${#nets[@]} -gt 0 ]; then
        flags+=(--t_name "${nets[@]}" --t_model "${models[@]}" --t_attributes "${lists[@]}")
    fi
    # shellcheck disable=SC2086  # several modes
    if [ -n "$wanted" ]; then flags+=(--attributes ${wanted//,/ }); fi
    # shellcheck disable=SC2086
    DATA=$FACES EPOCHS=$FACE_EPOCHS run train_ka.py --ka_mode $modes --s_name "${FACE_STUDENT:-$FACE_NET}" \
        --note "$FACE_RUN/$note" "${flags[@]}"
}

# Losses with a trainer of their own, and transformers that amalgamate tokens, on the embedded patterns and rooms: ten
# minutes of one core.
ka_tools() {
    local part halves=() quarters=() vits=() fast=(--batch_size 50 --schedule onecycle --lr 0.05)
    DATA=patterns:1000 EPOCHS=8
    run train_base.py --net_name resnet8 --note "$TOOL_RUN-all" "${fast[@]}"
    for part in 0 1; do
        halves+=("$SAVE_ROOT/$TOOL_RUN-half$part/net.pt")
        run train_base.py --net_name resnet8 --num_parts 2 --part "$part" --note "$TOOL_RUN-half$part" "${fast[@]}"
        vits+=("$SAVE_ROOT/$TOOL_RUN-vit$part/net.pt")
        DATA=patterns:400 EPOCHS=15 run train_base.py --net_name vit_64_3 --num_parts 2 --part "$part" \
            --note "$TOOL_RUN-vit$part" --batch_size 20 --schedule onecycle --lr 0.02
    done
    for part in 0 1 2 3; do
        quarters+=("$SAVE_ROOT/$TOOL_RUN-quarter$part/net.pt")
        run train_base.py --net_name resnet8 --num_parts 4 --part "$part" --note "$TOOL_RUN-quarter$part" "${fast[@]}"
    done
    DATA=patterns:400 EPOCHS=10 run train_ka.py --ka_mode ka_vit concat scratch --t_name vit_64_3 \
        --t_model "${vits[@]}" --s_name vit_64_3x2_16 --note "$TOOL_RUN/vit" --batch_size 20
    EPOCHS=10 run tools/subtask.py --t_name resnet8 --t_model "$SAVE_ROOT/$TOOL_RUN-all/net.pt" --s_name resnet8 \
        --sub 0,2,4,6,8 --lambda_adv 0 0.5 2 --adv_cap 2 --attack_epochs 20 --note "$TOOL_RUN/subtask" \
        --batch_size 50 --lr 2e-3
    EPOCHS=2 run tools/recombination.py --t_name resnet8 --t_model "${halves[@]}" --rounds 4 \
        --note "$TOOL_RUN/recombination" --batch_size 50
    EPOCHS=6 run tools/ood_ka.py --t_name resnet8 --t_model "${halves[@]}" --s_name resnet8 --ood scenes:400 \
        --width 16 --s_steps 3 --note "$TOOL_RUN/ood" --batch_size 64 --lr 2e-3
    for part in saliency uniform all; do
        EPOCHS=8 run tools/fedka.py --t_name resnet8 --t_model "${quarters[@]}" --s_name resnet8 --select "$part" \
            --probe 2 --local_epochs 2 --select_every 2 --adapt_every 1 --adapt_epochs 10 \
            --note "$TOOL_RUN/fedka-$part" --batch_size 50
    done
    DATA=scenes:500 EPOCHS=20 run tools/transformer_ka.py --note "$TOOL_RUN/detectors" --batch_size 32
    py -m report ka "$SAVE_ROOT/$TOOL_RUN" --out "$SAVE_ROOT/$TOOL_RUN"
}

# Students without data: a teacher, then a student of each method from images that are made. On the embedded
# patterns by default, with small settings; DFKD_DATA=cifar10 takes the authors' presets, hours of a GPU each.
dfkd() {
    local mode settings=()
    DATA=$DFKD_DATA
    data
    if [ "${DATA%%:*}" = patterns ]; then
        T_NAME=resnet8 S_NAME=resnet8 EPOCHS=4
    fi
    names
    run train_base.py --net_name "$T_NAME" --note "$T_RUN" --batch_size 64
    for mode in $DFKD_MODES; do
        if [ "${DATA%%:*}" = patterns ]; then
            # shellcheck disable=SC2207  # words without spaces
            settings=($(small "$mode"))
        fi
        # shellcheck disable=SC2086  # DFKD_FLAGS is several words on purpose
        py train_dfkd.py --kd_mode "$mode" --t_name "$T_NAME" --t_model "$SAVE_ROOT/$T_RUN/net.pt" \
            --s_name "$S_NAME" --data_name "$DATA" --img_root "$IMG_ROOT" --save_root "$SAVE_ROOT" --seed "$SEED" \
            --note "dfkd-$DATA-$T_NAME-$S_NAME-s$SEED" --resume auto ${settings[@]+"${settings[@]}"} $DFKD_FLAGS
    done
}

small() {    # settings for the patterns: seconds instead of hours
    local rest='--lr 0.05 --log_images 5' all='--width 16 --nz 64 --lr 0.05 --log_images 5'
    case $1 in
    dafl) echo "$all --batch_size 64 --epochs 10 --ep_steps 25 --lr_g 3e-3" ;;
    dfad) echo "$all --batch_size 32 --epochs 6 --ep_steps 80 --milestones 0.5 0.8" ;;
    fastdfkd)
        echo "$all --batch_size 64 --epochs 20 --warmup 8 --ep_steps 20 --kd_steps 20 --g_steps 20 --lr_g 5e-3" \
            "--bn 0.3 --oh 1 --adv 0 --T 4" ;;
    deepinv) echo "$rest --batch_size 32" ;;    # no generator
    kegnet) echo "--nz 64 $rest --batch_size 32" ;;    # its generators have no width
    *) echo "$all --batch_size 32" ;;    # the rest of the preset stays
    esac
}

ka_report() {
    py -m report ka "$SAVE_ROOT/$1" --out "$SAVE_ROOT/$1"
    py -m report figures "$SAVE_ROOT/$1" --out "$SAVE_ROOT/$1"
}
KA_MODES='concat parts mse layerwise cfl soka customize_target scratch'
ROOMS=scenes

# A language model teaches smaller ones; its teacher is trained first, once.
lm() {
    # shellcheck disable=SC2086  # LM_MODES and FLAGS are several words
    py train_lm.py --kd_mode $LM_MODES --data_name "$TEXT" --save_root "$SAVE_ROOT" --seed "$SEED" \
        --note "lm-${TEXT##*/}-s$SEED" --resume auto $FLAGS
}

# A segmenter and a detector teach smaller ones; the two trainings run beside each other, on a core each.
dense() {
    local common=(--data_name scenes --img_root "$IMG_ROOT" --save_root "$SAVE_ROOT" --seed "$SEED" --threads 1
        --batch_size 8 --resume auto)
    # shellcheck disable=SC2086  # modes and FLAGS are several words
    quietly py train_dense.py --task segmentation --kd_mode $SEG_MODES "${common[@]}" \
        --note "segmentation-scenes-s$SEED" $FLAGS
    # shellcheck disable=SC2086
    py train_dense.py --task detection --kd_mode $DET_MODES "${common[@]}" --steps 250 --t_steps 400 \
        --eval_every 125 --note "detection-scenes-s$SEED" $FLAGS
    wait_for_the_quiet_one
    py -m report dense "$SAVE_ROOT/segmentation-scenes-s$SEED" "$SAVE_ROOT/detection-scenes-s$SEED" \
        --out "$SAVE_ROOT/dense-scenes-s$SEED"
}

# All methods, in processes of GROUP students, but those that compare vision transformers: the networks here are none.
every_method() {
    local group=()
    for method in $METHODS; do
        case " tfkd_self $TEAMS " in *" $method "*) continue ;; esac    # have other teachers, below
        case " $VITS " in *" $method "*) continue ;; esac
        group+=("$method")
        if [ ${#group[@]} = "$GROUP" ]; then kd "${group[@]}"; group=(); fi
    done
    if [ ${#group[@]} -gt 0 ]; then kd "${group[@]}"; fi
    tfkd_self
    # shellcheck disable=SC2086  # TEAMS is several words
    team $TEAMS
    for method in $PEERS; do "$method"; done
}

table() {
    local wanted=("$SAVE_ROOT/$T_RUN" "$SAVE_ROOT/$S_RUN" "$SAVE_ROOT/$KD_RUN") more=() there=() folder method
    for method in $PEERS; do more+=("$SAVE_ROOT/$method-$DML_RUN"); done
    if [ "$A_RUN" != "$T_RUN" ]; then more+=("$SAVE_ROOT/$A_RUN"); fi
    for folder in "${wanted[@]}"; do    # all of whose methods results/ has is not there
        if [ -d "$folder" ] || [ -n "${DRY_RUN:-}" ]; then there+=("$folder"); fi
    done
    for folder in "${more[@]}"; do if [ -d "$folder" ]; then there+=("$folder"); fi; done
    if [ ${#there[@]} = 0 ]; then there=("${wanted[@]}"); fi    # the report says so
    py -m report table "${there[@]}" --out "$SAVE_ROOT/$KD_RUN"
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
    DATA=shapes:4000 T_NAME=resnet20 S_NAME=resnet8 EPOCHS=5 SAVE_ROOT=$SAVE_ROOT/quick
    T_RUN=teacher S_RUN=baseline KD_RUN=kd
    FLAGS="--batch_size 32 --schedule onecycle --lr 0.05 $FLAGS"
    say "Ten kinds of shapes, rendered here, 4000 images to learn from: four minutes on two cores. What is done stays;" \
        'interrupted, the same command continues.'
    say '1 of 4  A larger network, resnet20, learns from labels; it will be the teacher. Beside it, on another core, a' \
        'small one, resnet8, learns from labels alone: that is what distillation has to beat. Then, there, too, a' \
        'student that sees no image: fastdfkd makes some, of what a teacher of coloured patterns knows. A minute.'
    quietly alone_and_without_data
    run train_base.py --net_name "$T_NAME" --note "$T_RUN" --threads 1
    wait_for_the_quiet_one
    say '2 of 4  The small network again, from the same initial weights: it learns from labels and the teacher, in' \
        'three ways: st (the softened outputs), at (attention maps), sp (similarities between images). A minute.'
    kd st at sp

    # two teachers with half of the shapes each, students that know all ten
    say '3 of 4  Knowledge amalgamation: two teachers that know five shapes each. A minute.'
    PARTS=2 SPLIT=contiguous KA_RUN=amalgamated
    EPOCHS=10 FLAGS="$FLAGS --threads 1" two_part_teachers
    say '4 of 4  A small network learns all ten shapes from these two teachers without a single label: layerwise (from' \
        'their maps and outputs). scratch is the reference: it gets all labels. A minute.'
    KA_MODES='layerwise scratch' KA_EPOCHS=8 KA_FLAGS="--optim sgd"
    amalgamate
    say 'What came out, accuracy on new images after the last epoch:'
    py -m report overview "$SAVE_ROOT"
    say 'Next: more without images (dfkd), language models (lm), segmentation (dense), CIFAR-10 (cifar10); --help has all.'
}

alone_and_without_data() (    # in a shell of its own: dfkd has other names and data
    run train_base.py --net_name "$S_NAME" --note "$S_RUN" --threads 1
    FLAGS='--threads 1' DFKD_DATA=patterns DFKD_MODES=fastdfkd DFKD_FLAGS='--threads 1'
    dfkd
)

two_part_teachers() {
    quietly part_teacher 1
    part_teacher 0
    wait_for_the_quiet_one
}

quietly() {    # in the background, a thread of its own; what it says is in its log.txt
    if [ -n "${DRY_RUN:-}" ]; then "$@"; else "$@" >/dev/null & QUIET=$!; fi
}

wait_for_the_quiet_one() {    # and fail if it did
    if [ -n "${QUIET:-}" ]; then wait "$QUIET"; fi
    QUIET=
}

say() {    # a heading for who watches
    if [ -n "${DRY_RUN:-}" ]; then echo "# $*"; else printf '\n%s\n\n' "$*" | fold -s -w 100; fi
}

refuse() {
    echo "example_train_script.sh: error: $*" >&2
    exit 2
}

# The script's own value of such a flag would come later in the command and win, or its report read another folder.
own_flag() {
    local place
    case $1 in
    --epochs) place=EPOCHS=3 ;;
    --seed) place=SEED=3 ;;
    --data_name) place=DATA=cifar100 ;;
    --img_root) place='IMG_ROOT=FOLDER' ;;
    --save_root) place='SAVE_ROOT=FOLDER' ;;
    --kd_mode) refuse "$1: the script sets it; name the methods after kd" ;;
    --resume | --note) refuse "$1: the script sets it; --dry-run kd ... prints the commands, where you can change it" ;;
    *) return 0 ;;
    esac
    refuse "$1: the script sets it; say $place in front of bash"
}

# ----------------------------------------------------------------------------------------------------- main

if [ "${1:-}" = --dry-run ]; then DRY_RUN=1; shift; fi
usage="say quick, cifar10, cifar100, base, kd METHOD..., dml [METHOD...], table NAME, dfkd, ka, ka_claims, rooms, faces, ka_tools, lm, dense, or one of: $METHODS $PEERS"
command=${1:-}
case " quick cifar10 cifar100 base kd table dfkd ka ka_claims rooms faces ka_tools lm dense $METHODS $PEERS " in
*" ${command:-nothing} "*) ;;
*)
    case $command in
    help | -h | --help) sed -n '2,/^set /{/^#/p}' "$0" | sed 's/^# \{0,1\}//'; exit ;;
    *) refuse "${command:-nothing to do}: $usage" ;;
    esac ;;
esac
shift
case $command in
kd)
    case ${1:--} in -*) refuse 'say kd METHOD..., one method or several, then flags of train_kd.py' ;; esac
    flags=
    for word in "$@"; do
        case $word in --*) flags=1 ;; esac
        word=${word%%=*}
        if [ -n "$flags" ]; then
            case $word in --*-*) word=--$(printf %s "${word#--}" | tr - _) ;; esac    # --save-root is --save_root
            own_flag "$word"
            continue
        fi
        for part in ${word//+/ }; do    # all names before the first training
            case " $PEERS " in *" $part "*) refuse "kd $part: networks that learn from each other are trained by: dml $part" ;; esac
            case " $METHODS " in *" $part "*) ;; *) refuse "kd $word: no method is called $part" ;; esac
        done
    done ;;
table) [ $# = 1 ] || refuse 'say table NAME, a name of results/grid.json' ;;
dml)
    for method in "$@"; do    # all names before the first training
        case " $PEERS " in *" $method "*) ;; *) refuse "dml $method: say one of $PEERS" ;; esac
    done ;;
*) [ $# = 0 ] || refuse "$command: no words after it, got $*; for several methods: kd METHOD...; --dry-run comes first" ;;
esac
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
    chosen "$@"
    table ;;
dml)
    for method in ${@:-dml}; do "$method"; done ;;
table) rerun "$1" ;;
cd) cd_ ;;    # cd is the shell's own word
ka)
    data
    ka
    rooms
    faces
    ka_tools ;;
*) "$command" ;;
esac
if [ -n "$FAILED" ]; then
    echo 'example_train_script.sh: stopped: some losses became inf or NaN, or the memory of the GPU was too small' \
        '(above); all other commands are done' >&2
    exit 1
fi
