# Sourced by quickstart.sh and test.sh: makes or reuses a virtual environment, whose interpreter is then $python.
#
#     PYTHON   interpreter to make the environment with (default python3; 3.10 or newer), unless it exists already
#     VENV     folder of the environment (default .venv in the repository); packages are installed into an environment
#              of your own too, but only one that this script made is ever deleted
#
# $VENV/.cmt-installed is written last and lists what was installed: without it, an environment is new or half of one.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { echo "$(basename "$0"): $*"; }
die() { say "$*" >&2; exit 2; }
absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }

check_version() {
    local version
    version=$("$1" -c 'import sys; print(*sys.version_info[:2], sep=".")' 2>/dev/null) ||
        die "$1 does not start: set PYTHON to Python 3.10 or newer"
    case $version in 3.[0-9] | 2.*) die "$1 is Python $version: set PYTHON to Python 3.10 or newer" ;; esac
}

# prepare_environment [PACKAGES beside requirements.txt]
prepare_environment() {
    local maker=${PYTHON:-python3} installed made=
    VENV=$(absolute "${VENV:-$root/.venv}")
    [ ! -d "$VENV" ] || [ -e "$VENV/pyvenv.cfg" ] || [ -z "$(find "$VENV" ! -type d -print -quit)" ] ||
        die "VENV=$VENV holds files and is no virtual environment: choose another VENV"
    mkdir -p "$VENV" 2>/dev/null && [ -w "$VENV" ] || die "cannot write to VENV=$VENV: choose another VENV"
    VENV=$(cd "$VENV" && pwd -P)  # venv refuses a link
    python=$VENV/bin/python
    installed=$VENV/.cmt-installed

    if grep -qs "^prompt = 'cmt-env.sh'" "$VENV/pyvenv.cfg"; then made=yes; fi
    if [ ! -e "$VENV/pyvenv.cfg" ] || { [ -n "$made" ] && { [ ! -e "$installed" ] || ! "$python" -c '' 2>/dev/null; }; }; then
        [ -z "$made" ] || say "$VENV is incomplete: starting over"
        check_version "$maker"
        say "making a virtual environment in $VENV"
        "$maker" -m venv --clear --prompt cmt-env.sh "$VENV" ||
            die "$maker -m venv $VENV failed: install the venv module (Debian: python3-venv) or set PYTHON"
    fi
    check_version "$python"

    if [ "$installed" -nt "$root/requirements.txt" ] && [[ $(cat "$installed") == *"$*"* ]]; then return; fi
    say "installing requirements.txt${*:+ and $*}"
    rm -f "$installed"
    "$python" -m pip install --quiet --disable-pip-version-check -r "$root/requirements.txt" "$@" ||
        die "pip failed: run this again"
    echo "requirements.txt $*" >"$installed"
}
