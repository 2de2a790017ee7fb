# Sourced by quickstart.sh and test.sh: makes or reuses the virtual environment and leaves its interpreter in $python.
#
#     PYTHON   the interpreter to make it with (default python3; 3.10 or newer)
#     VENV     where it lies (default .venv in the repository); one of your own is installed into, and never deleted
#
# $VENV/.cmt remembers how far it got: `made` (by this script, so it may be emptied and made again), `installing` (while
# pip works; found later, it means half an environment), and for each set of packages the checksum of what was asked for.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { echo "$(basename "$0"): $*"; }
die() { say "$*" >&2; exit 2; }

# from where the user stands, whatever folder we change to later
absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }

prepare_environment() {
    VENV=$(absolute "${VENV:-$root/.venv}")
    state=$VENV/.cmt
    case ${PYTHON:-} in */*) PYTHON=$(absolute "$PYTHON") ;; esac
    if [ -n "${PYTHON:-}" ] || [ ! -e "$VENV/pyvenv.cfg" ]; then check_version "${PYTHON:-python3}"; fi

    # a folder that is no environment is left alone
    if [ -d "$VENV" ]; then
        [ -e "$state" ] || [ -e "$VENV/pyvenv.cfg" ] || [ -z "$(ls -A "$VENV")" ] ||
            die "VENV=$VENV holds files and is no virtual environment; choose another VENV"
    fi
    mkdir -p "$state" 2>/dev/null && [ -w "$state" ] || die "cannot write to VENV=$VENV; choose another VENV"
    VENV=$(cd "$VENV" && pwd -P)  # venv refuses a link
    python=$VENV/bin/python
    state=$VENV/.cmt

    # one install at a time; a pip that outlived its script holds the lock as well
    if command -v flock >/dev/null; then
        exec 9>"$state/lock"
        flock -n 9 || { say "waiting for another install into $VENV"; flock 9; }
    fi

    if [ -e "$VENV/pyvenv.cfg" ] && [ ! -e "$state/made" ]; then
        reusable || die "VENV=$VENV does not start, is not of PYTHON=${PYTHON:-python3}, or holds an install that did" \
            "not finish; this script did not make it: remove it or choose another VENV"
    elif ! reusable; then
        make_environment
    fi
    check_version "$python"
}

# it starts, nothing in it is half-installed, and it is of the version that was asked for
reusable() {
    [ ! -e "$state/installing" ] && version_of "$python" >/dev/null || return 1
    [ -z "${PYTHON:-}" ] || [ "$(version_of "$PYTHON")" = "$(version_of "$python")" ]
}

make_environment() {
    local maker=${PYTHON:-python3}
    check_version "$maker"
    "$maker" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$maker cannot make virtual environments; install its venv module (Debian: python3-venv) or set PYTHON"
    [ "$("$maker" -c 'import os, sys; print(os.path.realpath(sys.prefix))')" != "$(cd "$VENV" && pwd -P)" ] ||
        die "PYTHON=$maker lies in VENV=$VENV, which has to be made again; set another PYTHON"

    # marked before anything is in it
    if [ -e "$state/made" ]; then say "$VENV is incomplete or of another Python; starting over"; fi
    touch "$state/made" "$state/installing"
    (cd "$VENV" && find . -mindepth 1 ! -path ./.cmt ! -path ./.cmt/made ! -path ./.cmt/installing \
        ! -path ./.cmt/lock -delete)
    say "making a virtual environment in $VENV"
    "$maker" -m venv "$VENV" || die "$maker -m venv $VENV failed"
}

# install NAME ARGUMENTS OF pip install
install() {
    local name=$1 wanted
    shift
    wanted=$(echo "$*" | cat - "$root/requirements.txt" | cksum)
    if [ ! -e "$state/installing" ] && [ "$(cat "$state/$name" 2>/dev/null)" = "$wanted" ]; then return; fi
    say "installing $name"
    touch "$state/installing"
    "$python" -m pip install --quiet --disable-pip-version-check "$@" || die "pip failed; run this again to start over"
    echo "$wanted" >"$state/$name"
    rm "$state/installing"
}

install_requirements() { install requirements -r "$root/requirements.txt"; }

release_lock() { exec 9>&-; }

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

check_version() {
    local version
    version=$(version_of "$1") || die "$1 does not start; set PYTHON to Python 3.10 or newer"
    case $version in
        3.[0-9] | [0-2].*) die "$1 is Python $version; set PYTHON to Python 3.10 or newer" ;;
    esac
}
