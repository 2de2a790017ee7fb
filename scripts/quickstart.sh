#!/usr/bin/env bash
# bash scripts/quickstart.sh [arguments of train.py]
#
# Install the requirements into a virtual environment, train cmt_ti on the scanned digits of scikit-learn, evaluate the
# checkpoints and draw the curves. Python 3.10 or newer and a network for pip are needed, no GPU and no data.
#
#     PYTHON, VENV   see env.sh
#     OUTPUT         the run's folder (default output/digits in the repository). A run in the default folder is
#                    replaced, unless --resume auto is given; a run in OUTPUT is replaced only with --overwrite.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

config=$root/configs/digits.yaml
output=$(absolute "${OUTPUT:-$root/output/digits}")
for argument; do
    case $argument in --output[-_]dir*) die "set OUTPUT=FOLDER instead of $argument" ;; esac
done

prepare_environment

# threads beyond two do not speed up a model so small, and active waiting burns time on a busy machine
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

overwrite=
if [ -z "${OUTPUT:-}" ] && [ -e "$output" ]; then
    case " $* " in
        *' --resume'*) ;;
        *) say "replacing the earlier run in $output (set OUTPUT to keep it)"; overwrite=--overwrite ;;
    esac
fi
say "training cmt_ti on digits"
"$python" "$root/train.py" --config "$config" --output_dir "$output" $overwrite "$@"

say "evaluating the best checkpoint, then the best of the averaged weights"
"$python" "$root/train.py" --config "$config" "$@" --eval --resume "$output/checkpoint_best.pth" --no-model-ema
if [ -e "$output/checkpoint_ema_best.pth" ]; then
    "$python" "$root/train.py" --config "$config" "$@" --eval --resume "$output/checkpoint_ema_best.pth"
fi

"$python" "$root/scripts/plot_log.py" "$output" -o "$output/curves.png"

cat <<END

The run is in $output
    checkpoint_best.pth, checkpoint_ema_best.pth   the best weights, and the best of their average
    checkpoint_last.pth                            to resume from, with --resume
    log.txt                                        a JSON object an epoch
    curves.png                                     its curves

Next, photographs of your own, in a folder for each class:
    source $VENV/bin/activate
    cd $root
    python train.py --config configs/digits.yaml --data-set IMNET --data-path photos --val-split 0.2 --epochs 30 \\
        --hflip 0.5 --output-dir output/mine
    python scripts/predict.py output/mine/checkpoint_ema_best.pth photos --picture answers.png
ImageNet and all else: README.md
END
