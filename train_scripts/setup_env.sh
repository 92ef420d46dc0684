# Sourced by the quickstart and the tests: makes .venv in the repository's root, installs into it, activates it.
# usage: source train_scripts/setup_env.sh [EXTRAS]      (EXTRAS such as "dev,deepspeed")
# A torch >= 2.11 that the calling Python already imports (a GPU machine's) is used as it is.

easyctx_setup_env() {
  local root extras="${1:-}" python="${PYTHON:-python3}"
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: easyctx needs Python >= 3.11, and '$python' is $("$python" --version 2>&1 || echo missing);" \
      "set PYTHON=/path/to/python3.11 or newer" >&2
    return 1
  fi
  local wanted="easyctx${extras:+[$extras]} with $(cksum <"$root/constraints.txt") $(cksum <"$root/pyproject.toml")"
  local stamp="$root/.venv/.easyctx_installed"
  if [ ! -x "$root/.venv/bin/python" ]; then
    local outer=""
    outer=$("$python" - <<'EOF' 2>/dev/null
import pathlib, torch
if tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 11):
    print(pathlib.Path(torch.__file__).parent.parent)
EOF
    ) || outer=""
    echo "easyctx: making $root/.venv${outer:+ around the torch in $outer}"
    "$python" -m venv ${outer:+--system-site-packages} "$root/.venv" || return 1
    if [ -n "$outer" ]; then
      # Named outright, since the calling Python may itself be a venv's, whose packages a new venv does not see.
      echo "$outer" >"$("$root/.venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer_torch.pth"
    fi
  fi
  # shellcheck disable=SC1091
  source "$root/.venv/bin/activate" || return 1
  if ! grep -qsxF "$wanted" "$stamp"; then
    echo "easyctx: installing (once; a few minutes on a bare machine)"
    local pip=(python -m pip install --quiet --disable-pip-version-check)
    if grep -qi '^include-system-site-packages = true' "$root/.venv/pyvenv.cfg"; then
      # What is there stays; only what is missing comes.
      "${pip[@]}" -e "$root${extras:+[$extras]}" || return 1
    else
      "${pip[@]}" -c "$root/constraints.txt" torch || return 1
      "${pip[@]}" -c "$root/constraints.txt" -e "$root${extras:+[$extras]}" || return 1
    fi
    echo "$wanted" >>"$stamp"
  fi
}

easyctx_setup_env "${1:-}"
