"""Methods: how many candidates (observation window excluded) each KV head keeps. One file a method.

A method's allocation is a pure function that returns int64 [B, Hkv]. The sum over a batch row is exactly the budget of that row:
nothing is lost to rounding, no head gets more than it has candidates, and what one head cannot use goes to the others. To add a
method: a file that ends in `registry.add`, and its line below.
"""

# ruff: noqa: F401, I001
# In the order in which they are listed.
from . import snapkv
from . import pyramidkv
from . import adakv
from . import sparsemm
from . import global_
from . import hybridkv
