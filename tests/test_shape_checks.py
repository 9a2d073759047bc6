"""Shape checks of the tests themselves: early calls are checked, later ones are not, and the next test begins anew."""

import jaxtyping
import pytest
import torch

import shape_checks
from diffquant.core import affine
from diffquant.core.spec import QuantSpec

pytestmark = pytest.mark.skipif(not hasattr(affine.scale_from_range, "__wrapped__"), reason="without --jaxtyping-packages")
WRONG = torch.zeros(2), torch.ones(3), QuantSpec(bits=8)


@pytest.mark.parametrize("turn", [1, 2])
def test_calls_are_checked_until_there_were_enough_of_them(turn):
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'high'"):
        affine.scale_from_range(*WRONG)
    for _ in range(shape_checks.CHECKS):
        affine.scale_from_range(torch.zeros(2), torch.ones(2), QuantSpec(bits=8))
    with pytest.raises(RuntimeError, match="size of tensor a"):
        affine.scale_from_range(*WRONG)
