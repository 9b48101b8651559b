"""The modules of this folder use a suite as its clients do, good ones and bad ones."""

from __future__ import annotations

import sys
from pathlib import Path

# `support` is what the tests of the whole suite share.
sys.path.insert(0, str(Path(__file__).parents[1]))

from support.fixtures import suite

__all__ = ["suite"]
