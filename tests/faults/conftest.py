"""The modules of this folder hurt the servers and processes of a suite, and it must live on."""

from __future__ import annotations

import sys
from pathlib import Path

# `support` is what the tests of the whole suite share.
sys.path.insert(0, str(Path(__file__).parents[1]))

from support.fixtures import suite

__all__ = ["suite"]
