# Sourced by speedrun.sh and test.sh: a virtual environment (unless one is active) with the pinned packages of file $1.
python=$(command -v python3 || command -v python) || { echo "error: no python3 found; install Python 3.11 or newer" >&2; exit 2; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "error: $("$python" --version) is too old; Python 3.11 or newer is needed" >&2; exit 2; }
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    [ -x .venv/bin/python ] || "$python" -m venv .venv ||
        { echo "error: could not make a virtual environment; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 2; }
    . .venv/bin/activate
fi
echo "packages of $1: some minutes when they are installed for the first time" >&2
python -m pip install --quiet --disable-pip-version-check -r "$1"
