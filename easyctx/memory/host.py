"""How much host memory there is to use."""

import os
from pathlib import Path

_NO_LIMIT = 1 << 60  # cgroup v1 writes a number near 2^63 for none
_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")


# Of what is available: pinned memory cannot be swapped out, and a machine that runs out of memory kills the run.
LEFT_ALONE = 0.04


def usable_host_memory() -> int:
    """Bytes of host memory to plan with."""
    return int(available_host_memory() * (1 - LEFT_ALONE))


def available_host_memory() -> int:
    """Bytes of host memory that this machine's processes can still have.

    The smaller of what the kernel calls available and what the container's limit leaves. A limit above the machine's
    total is believed instead of the total: there are virtual machines that are given memory as they use it.
    """
    info = _meminfo()
    left = [limit - used for limit, used in _limits()]
    limit = min((limit for limit, _ in _limits()), default=None)
    if limit is not None and limit > info["MemTotal"]:
        return max(min(left), 0)
    return max(min([info["MemAvailable"], *left]), 0)


def _meminfo() -> dict[str, int]:
    if not (_PROC / "meminfo").exists():  # not Linux: all there is
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return {"MemTotal": total, "MemAvailable": total}
    lines = (_PROC / "meminfo").read_text().splitlines()
    return {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":", 1) for line in lines)}


def _limits() -> list[tuple[int, int]]:
    """(limit, bytes in use that cannot be reclaimed) of each control group above this process that has a limit."""
    found = []
    for folder, names in _groups():
        limit, used = (_number(folder / name) for name in names)
        if limit is not None and used is not None and limit < _NO_LIMIT:
            found.append((limit, used - min(_cache(folder), used)))
    return found


def _groups() -> list[tuple[Path, tuple[str, str]]]:
    """The folders of this process's memory groups up to the root, versions 2 and 1, with their files' names."""
    v2, v1 = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
    found = [(_CGROUP, v2), (_CGROUP / "memory", v1)]
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        parts = Path(path.lstrip("/")).parts
        if not controllers or "memory" in controllers.split(","):
            root, names = (_CGROUP / "memory", v1) if controllers else (_CGROUP, v2)
            found += [(root.joinpath(*parts[: i + 1]), names) for i in range(len(parts))]
    return found


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None


def _cache(folder: Path) -> int:
    """Bytes of files that the group's memory holds, which are dropped when it is needed."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    found = {line.split()[0]: int(line.split()[1]) for line in lines if len(line.split()) == 2}
    return found.get("inactive_file", 0) or found.get("total_inactive_file", 0)
