"""The paper's own data structures (arXiv 2407.14717), faithful, with every term noised and counted. The reference and the baseline.

Bottom up: `DPTree` (tree.py), `DPTreeDistance` and `DPTreeHighDim` (distance.py), `DPTreeSoftmax` (softmax.py), `DPTreeCrossAttention`
(tree_attention.py). `budget.py` splits (epsilon, delta), `tree_moments.py` turns rows into integers, `dptree.py` and `tree_structure.py`
join them to `release_attention` and `protect`.
"""

from .budget import BudgetSplit, Part
from .distance import DPTreeDistance, DPTreeHighDim
from .softmax import DPTreeSoftmax
from .tree import DPTree
from .tree_attention import DPTreeCrossAttention

__all__ = [
    "BudgetSplit",
    "DPTree",
    "DPTreeCrossAttention",
    "DPTreeDistance",
    "DPTreeHighDim",
    "DPTreeSoftmax",
    "Part",
]
