"""The analysts' library: the event history as open Parquet files, SQL and exact funnels over it, charts and reports.

    from kehu.lake import FunnelSpec, Lake, Step

The names below are loaded when they are first used, so that a process that only writes the lake does not pay for the
compiler and the plotting library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kehu.lake.compaction import CompactResult, VacuumResult, compact, vacuum
    from kehu.lake.errors import (
        LakeConflict,
        LakeCorrupt,
        LakeError,
        LakeGap,
        LakeMissing,
        QueryRefused,
        SnapshotGone,
    )
    from kehu.lake.format import Record
    from kehu.lake.funnel import FunnelResult, evaluate
    from kehu.lake.log import Snapshot
    from kehu.lake.reader import Lake
    from kehu.lake.report import Report
    from kehu.lake.spec import Exclusion, FunnelSpec, Step
    from kehu.lake.writer import AppendResult, LakeWriter

_HOME = {
    "AppendResult": "writer",
    "CompactResult": "compaction",
    "Exclusion": "spec",
    "FunnelResult": "funnel",
    "FunnelSpec": "spec",
    "Lake": "reader",
    "LakeConflict": "errors",
    "LakeCorrupt": "errors",
    "LakeError": "errors",
    "LakeGap": "errors",
    "LakeMissing": "errors",
    "LakeWriter": "writer",
    "QueryRefused": "errors",
    "Record": "format",
    "Report": "report",
    "Snapshot": "log",
    "SnapshotGone": "errors",
    "Step": "spec",
    "VacuumResult": "compaction",
    "compact": "compaction",
    "evaluate": "funnel",
    "vacuum": "compaction",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


__all__ = [
    "AppendResult",
    "CompactResult",
    "Exclusion",
    "FunnelResult",
    "FunnelSpec",
    "Lake",
    "LakeConflict",
    "LakeCorrupt",
    "LakeError",
    "LakeGap",
    "LakeMissing",
    "LakeWriter",
    "QueryRefused",
    "Record",
    "Report",
    "Snapshot",
    "SnapshotGone",
    "Step",
    "VacuumResult",
    "compact",
    "evaluate",
    "vacuum",
]
