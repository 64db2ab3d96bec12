# shellcheck shell=bash
# Sourced by the peer_environment.sh of each folder: an environment that borrows the libraries of another.
#
#     start_environment DIR [PYTHON]      makes DIR and sets root (of this tree) and target (DIR)
#     put_tree_first                      mmd2v comes from this tree, before both
#
# PYTHON (by default .venv/bin/python) lends its torch and everything else: both sides run on the same libraries, and it
# takes seconds instead of gigabytes.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
purelib='import sysconfig; print(sysconfig.get_path("purelib"))'

start_environment() {
    target=${1:?usage: peer_environment.sh DIR [PYTHON]}
    local python=${2:-$root/.venv/bin/python}
    "$python" -m venv "$target"
    own=$("$target/bin/python" -c "$purelib")
    # Named to come last: what is installed into DIR itself is found first.
    "$python" -c "$purelib" > "$own/zz_lent.pth"
}

put_tree_first() {
    printf '%s\n' "import sys; sys.path[:0] = [$(printf "'%s', '%s/kernels'" "$root" "$root")]" > "$own/aa_tree.pth"
}
