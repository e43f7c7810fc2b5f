"""Weight averages of two models, as the published Stage C is one (arXiv 2306.00637, appendix E.3)."""

from collections.abc import Mapping

from torch import Tensor


def weighted_average(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """share · second + (1 − share) · first, of two state dicts with the same keys and shapes.

    What is not floating (counts) is the second's.
    """
    assert first.keys() == second.keys()
    return {
        name: first[name].lerp(tensor, share) if tensor.is_floating_point() else tensor
        for name, tensor in second.items()
    }
