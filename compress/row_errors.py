"""How far a layer's rows are from what they should be, every token counting the same.

A norm over all tokens would not do: language models give their first token massive activations (arXiv 2402.17762), in
some layers a thousand times all others', so such a norm would tell of that one token and of nothing else.
"""

import math

from torch import Tensor


def squared_row_errors(exact: Tensor, approximate: Tensor) -> Tensor:
    """‖y − ŷ‖² / ‖y‖² of every row, float64 [rows]; 0 for a row that is 0. Both: [..., C]."""
    whole = exact.double().square().sum(-1).flatten()
    error = (exact - approximate).double().square().sum(-1).flatten()
    return (error / whole).where(whole != 0, 0.0)  # what is not a number stays so


def relative_error(exact: Tensor, approximate: Tensor) -> float:
    """√(mean over rows of ‖y − ŷ‖² / ‖y‖²). Both: [..., C]."""
    return math.sqrt(float(squared_row_errors(exact, approximate).mean()))
