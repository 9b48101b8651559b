"""`python -m bench` runs every benchmark, `python -m bench relay funnel` some, `python -m bench --list` names them."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import bench

NAMES = sorted(m.name for m in pkgutil.iter_modules(bench.__path__) if m.name not in ("__main__", "kit"))


def main() -> int:
    """Run each benchmark in a process of its own, so that none warms up another."""
    asked = sys.argv[1:]
    if asked == ["--list"]:
        for name in NAMES:
            summary = (importlib.import_module(f"bench.{name}").__doc__ or "").strip().splitlines()
            print(f"{name:14} {summary[0] if summary else ''}")
        return 0
    unknown = [name for name in asked if name not in NAMES]
    if unknown:
        print(f"no benchmark {', '.join(unknown)}; there are: {', '.join(NAMES)}", file=sys.stderr)
        return 2
    failed = [
        name
        for name in asked or NAMES
        if subprocess.run([sys.executable, "-m", f"bench.{name}"], check=False).returncode
    ]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
