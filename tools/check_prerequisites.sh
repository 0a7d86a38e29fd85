#!/usr/bin/env bash
# Says what a build needs and this machine lacks, with the line that installs it. Usage: check_prerequisites.sh PYTHON
set -u
python=${1:-python3}
missing=()
command -v g++ >/dev/null || missing+=(g++)
command -v make >/dev/null || missing+=(make)
if ! command -v "$python" >/dev/null; then
  missing+=(python3 python3-dev python3-venv)
else
  "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
  "$python" -c 'import pathlib, sys, sysconfig
sys.exit(not (pathlib.Path(sysconfig.get_path("include")) / "Python.h").is_file())' || missing+=(python3-dev)
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "narrowcast needs Python 3.11 or newer, $("$python" --version) found; name another with: make PYTHON=python3.12" >&2
    exit 1
  }
fi
if [ ${#missing[@]} -gt 0 ]; then
  echo "missing: ${missing[*]}; install with: sudo apt-get install ${missing[*]}" >&2
  exit 1
fi
