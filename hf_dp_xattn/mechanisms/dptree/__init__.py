"""The paper's own data structures (arXiv 2407.14717), faithful, with every term noised and counted. The reference and the baseline.

Bottom up: `DPTree` (tree.py), `DPTreeDistance` and `DPTreeHighDim` (distance.py), `DPTreeSoftmax` (softmax.py), `DPTreeCrossAttention`
(attention.py), `MedianOfCopies` (adaptive.py). `budget.py` splits (epsilon, delta), `moments.py` turns rows into integers,
`release.py` and `structure.py` join them to `release_attention` and `protect`.
"""

from .adaptive import MedianOfCopies
from .attention import DPTreeCrossAttention
from .budget import BudgetSplit, Part
from .distance import DPTreeDistance, DPTreeHighDim
from .softmax import DPTreeSoftmax
from .tree import DPTree

__all__ = [
    "BudgetSplit",
    "DPTree",
    "DPTreeCrossAttention",
    "DPTreeDistance",
    "DPTreeHighDim",
    "DPTreeSoftmax",
    "MedianOfCopies",
    "Part",
]
