"""Contexts that grow: documents arrive over time, one release goes on for a public number of appends, at one charge a unit.

`grow(prepared, horizon)` turns a prepared release of kernel_sum or anchors into one that grows; `GrowingRelease` takes the appends.
The sums go through `privacy/continual.py`.
"""

from .release import GrowingRelease, PreparedGrowing, grow
from .sources import LayerRows

__all__ = ["GrowingRelease", "LayerRows", "PreparedGrowing", "grow"]
