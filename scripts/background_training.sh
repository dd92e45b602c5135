#!/bin/sh
# Trains on what a machine has to spare: one thread, at the lowest priority, from a clone that stays as
# it is while the project changes.
#   scripts/background_training.sh start FOLDER OPTION_FILE [more flags of train.py]
#   scripts/background_training.sh status FOLDER
#   scripts/background_training.sh stop FOLDER       its iteration is saved; start resumes it
# FOLDER/code is the clone, made at the first start; data sets lie in FOLDER/code/datasets.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
usage() { sed -n '2,7p' "$0" >&2; exit 2; }
[ $# -ge 2 ] || usage
action=$1
mkdir -p "$2"
folder=$(cd "$2" && pwd)
shift 2
code=$folder/code

running() { [ -f "$folder/pid" ] && kill -0 "$(cat "$folder/pid")" 2>/dev/null; }

case $action in
start)
    [ $# -ge 1 ] || usage
    if running; then echo "it runs already, as process $(cat "$folder/pid")"; exit 1; fi
    [ -d "$code" ] || git clone -q "$root" "$code"
    python=${PYTHON:-$root/.venv/bin/python}
    cd "$code"
    "$python" setup.py -q build_ext --inplace
    options=$1
    shift
    OMP_NUM_THREADS=1 PYTHONPATH=$code nohup nice -n 19 "$python" train.py -opt "$options" \
        --auto_resume "$@" >>"$folder/train.out" 2>&1 &
    echo $! >"$folder/pid"
    echo "started as process $!; it writes to $folder/train.out"
    ;;
status)
    if running; then echo "running, process $(cat "$folder/pid")"; else echo "not running"; fi
    tail -n 3 "$folder/train.out" 2>/dev/null || echo "nothing was started in $folder"
    ;;
stop)
    if ! running; then echo "not running"; exit 1; fi
    kill -TERM "$(cat "$folder/pid")"
    while running; do sleep 1; done
    tail -n 1 "$folder/train.out"
    ;;
*) usage ;;
esac
