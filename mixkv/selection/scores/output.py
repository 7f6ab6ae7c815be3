"""Window attention times what an entry adds to the layer's output, alone or mixed with diversity."""

from __future__ import annotations

from ...registry import Score, add
from .attention import attn
from .mix import mix

add(Score("output", attn, "window attention times what the entry adds to the layer's output", uses_output_importance=True))
add(Score("mix-output", mix, "output mixed with diversity as in mix", uses_output_importance=True))
