#!/bin/sh
# Sets up everything `make demo` (argument "demo") or `make test` (argument "test") needs, once.
# Debian packages are installed where that is allowed (root, or sudo without a password); otherwise the line to type is printed.
set -eu
what=${1:-demo}
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*" >&2; }

need_package() { # COMMAND PACKAGE
    command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || [ -x "/usr/bin/$1" ] || missing="$missing $2"
}

need_postgres() { # Debian keeps the server's programs off the PATH
    for program in /usr/lib/postgresql/*/bin/postgres; do [ -x "$program" ] && return; done
    command -v postgres >/dev/null 2>&1 || missing="$missing postgresql"
}

install_packages() {
    if [ "$(id -u)" = 0 ]; then as=""; elif sudo -n true 2>/dev/null; then as="sudo -n"; else
        say "missing:$missing"
        say "type: sudo apt-get install -y$missing"
        exit 1
    fi
    if ! command -v apt-get >/dev/null 2>&1; then
        say "missing:$missing (Debian names); install them with your system's package manager"
        exit 1
    fi
    say "installing$missing"
    $as apt-get update -qq
    # shellcheck disable=SC2086 # a list of package names
    DEBIAN_FRONTEND=noninteractive $as apt-get install -y -qq --no-install-recommends $missing >/dev/null
}

python=${PYTHON:-}
for candidate in python3.11 python3.12 python3.13 python3; do
    [ -n "$python" ] && break
    if command -v $candidate >/dev/null 2>&1 && $candidate -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'; then
        python=$candidate
    fi
done

missing=""
[ -n "$python" ] || missing="$missing python3"
if [ -n "$python" ]; then
    "$python" -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
fi
need_package ssh-keygen openssh-client
if [ "$what" = test ]; then
    need_package sshd openssh-server
    need_package chromium chromium
    need_postgres
fi
[ -z "$missing" ] || install_packages
[ -n "$python" ] || python=python3
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || {
    say "$python is $("$python" -V 2>&1); Python 3.11, 3.12 or 3.13 is needed (name one with PYTHON=…)"
    exit 1
}

extras=all
[ "$what" = test ] && extras=all,test
stamp=.venv/edgevit-$what
wanted=$(cat pyproject.toml constraints.txt | sha256sum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi
say "making .venv with $("$python" -V) (about 2.5 GB; some minutes the first time)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$extras]" --constraint constraints.txt
printf '%s\n' "$wanted" >"$stamp"
