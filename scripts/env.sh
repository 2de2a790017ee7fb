# Sourced by quickstart.sh and test.sh: create or reuse a virtual environment, and set $python to its interpreter.
#
#     PYTHON   interpreter for a new environment (default python3; 3.10 or newer)
#     VENV     folder of the environment (default .venv in the repository)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { echo "$(basename "$0"): $*"; }
die() { say "$*" >&2; exit 2; }

case " $* " in *' --help '* | *' -h '*)
    awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
    exit ;;
esac

# prepare_environment [PACKAGES in addition to requirements.txt]
prepare_environment() {
    local maker=${PYTHON:-python3} installed
    mkdir -p "${VENV:=$root/.venv}" || die "cannot write to VENV=$VENV: choose another VENV"
    VENV=$(cd "$VENV" && pwd -P)
    python=$VENV/bin/python
    installed=$VENV/.cmt-installed
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        "$maker" -m venv "$VENV" || die "$maker -m venv $VENV failed: set PYTHON, or install the venv module"
    fi
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "$python is older than Python 3.10: set PYTHON"

    # The marker is written last, so an interrupted installation is repeated.
    if [ "$installed" -nt "$root/requirements.txt" ] && [[ $(cat "$installed") == *"$*"* ]]; then return; fi
    say "installing requirements.txt${*:+ and $*}"
    rm -f "$installed"
    "$python" -m pip install --quiet --disable-pip-version-check -r "$root/requirements.txt" "$@" ||
        die "pip failed: run this again"
    echo "requirements.txt $*" >"$installed"
}
