"""Types and shapes of arguments and results are checked while tests run (conftest.py of the repository)."""

import beartype.roar
import jaxtyping
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from wuerstchen.models.compressor import CompressorConfig, compressor_input, latent_side

WRONG = beartype.roar.BeartypeCallHintViolation


def test_functions_of_the_package_are_checked():
    compressor_input(torch.rand(1, 3, 32, 32))
    with pytest.raises(WRONG):
        compressor_input(torch.rand(3, 32, 32))
    with pytest.raises(WRONG):
        compressor_input(torch.zeros(1, 3, 32, 32, dtype=torch.long))
    with pytest.raises(WRONG):
        latent_side(1.5)
    with pytest.raises((WRONG, jaxtyping.TypeCheckError)):
        CompressorConfig(c_latent=1.5)


def test_axes_of_one_name_have_one_size_within_a_call_and_its_result():
    @jaxtyping.jaxtyped
    def rows(x: Float[Tensor, "b c"], y: Float[Tensor, " b"], good: bool = True) -> Float[Tensor, "b b"]:
        return x.new_zeros(len(y), len(y) if good else len(y) + 1)

    for count in (2, 3):  # each call has its own
        rows(torch.zeros(count, 5), torch.zeros(count))
    with pytest.raises(WRONG):
        rows(torch.zeros(2, 5), torch.zeros(3))
    with pytest.raises(WRONG):
        rows(torch.zeros(2, 5), torch.zeros(2), good=False)


def test_methods_are_checked_too():
    class Counter:
        @jaxtyping.jaxtyped
        def add(self, number: int) -> str:
            return str(number) if number else number

        @jaxtyping.jaxtyped
        @classmethod
        def of(cls, number: int) -> None: ...

        @jaxtyping.jaxtyped
        @staticmethod
        def plain(number: int) -> None: ...

    Counter().add(1), Counter.of(1), Counter.plain(1)
    for call in (lambda: Counter().add("1"), lambda: Counter().add(0), lambda: Counter.of("1")):
        with pytest.raises(WRONG):
            call()
    with pytest.raises(WRONG):
        Counter.plain("1")
