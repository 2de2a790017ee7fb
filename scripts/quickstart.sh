#!/usr/bin/env bash
# bash scripts/quickstart.sh [arguments of train.py]
#
# Install the requirements into a virtual environment, train cmt_ti on the scanned digits of scikit-learn, evaluate the
# checkpoints and draw the curves. This needs Python 3.10 or newer and a network for pip, but no GPU and no data.
#
#     PYTHON, VENV   see env.sh
#     OUTPUT         folder of the run (default output/digits in the repository). A run in the default folder is
#                    replaced, unless you pass --resume auto. A run in OUTPUT is replaced only with --overwrite.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

config=$root/configs/digits.yaml
output=${OUTPUT:-$root/output/digits}
for argument; do
    case $argument in --output[-_]dir*) die "set OUTPUT=FOLDER instead of $argument" ;; esac
done

prepare_environment

# More than two threads do not speed up such a small model, and active waiting wastes time on a busy machine.
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
for checkpoint in "$output"/checkpoint_best.pth "$output"/checkpoint_ema_best.pth; do
    [ ! -e "$checkpoint" ] || "$python" "$root/train.py" "$@" --eval --resume "$checkpoint"
done

cat <<END

The run is in $output
    checkpoint_best.pth, checkpoint_ema_best.pth   the best weights, and the best of their running average
    checkpoint_last.pth                            resumes the run, with --resume
    log.txt, curves.png                            one JSON object per epoch, and its curves
    per_class.csv, confusion.png, mistakes.jpg     which classes and images are misclassified

Next, your own photographs, with one folder per class:
    source $VENV/bin/activate
    cd $root
    python train.py --config configs/from_scratch.yaml --data-path photos --output-dir output/mine    # on a CPU
    python train.py --config configs/finetune.yaml --data-path photos --output-dir output/mine        # released weights
ImageNet and everything else: README.md
END
