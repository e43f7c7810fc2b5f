"""Frozen linear layers with weights in int8, for training an adapter on a network that would not fit."""

import math
from typing import no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

LARGE = 2**16  # minimum number of elements for a matrix to be quantized
_LEVELS = 127


class Int8Linear(nn.Linear):
    """A frozen linear layer with int8 weights and one fp32 scale per row: a quarter of the memory of fp32.

    The weights are dequantized for every product, to the precision that it is computed in. Gradients flow
    through the layer, and only the int8 weights are kept for them.
    """

    scale: Float[Tensor, " out"]

    def __init__(self, layer: nn.Linear) -> None:
        """The weights of ``layer``, rounded to the nearest of 255 levels per row."""
        with torch.device("meta"):
            super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        weight, scale = quantized(layer.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("scale", scale)
        self.requires_grad_(False)

    @no_type_check  # tests check annotations at run time, in code that torch cannot compile
    def forward(self, x: Float[Tensor, "*b in"]) -> Float[Tensor, "*b out"]:
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return int8_linear(x.to(dtype), self.weight, self.scale, bias)


def quantized(weight: Tensor) -> tuple[Int8[Tensor, "out in"], Float[Tensor, " out"]]:
    """The weight in int8, and the scale of each row in fp32. The error is at most half a scale."""
    exact = weight.float()
    scale = (exact.abs().amax(1) / _LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
    return (exact / scale[:, None]).round().to(torch.int8), scale


def quantize_linear_layers(network: nn.Module, least: int = LARGE) -> None:
    """Replaces the large linear layers of a frozen network by ``Int8Linear`` ones, in place."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.numel() >= least:
                setattr(parent, name, Int8Linear(child))


def _dequantized(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight.to(scale.dtype) * scale[:, None]).to(dtype)


# Custom operators as in ``models.mlp``: compiled code must not keep the dequantized weight either.
@torch.library.custom_op("wuerstchen::int8_linear", mutates_args=())
def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x · Wᵀ + b for int8 weights (out, in) with a scale (out), in the precision of ``x``."""
    return F.linear(x, _dequantized(weight, scale, x.dtype), bias)


@int8_linear.register_fake
def _(x, weight, scale, bias):
    return x.new_empty(*x.shape[:-1], len(weight))


@torch.library.custom_op("wuerstchen::int8_linear_backward", mutates_args=())
def int8_linear_backward(gradient: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The gradient of x."""
    return gradient @ _dequantized(weight, scale, gradient.dtype)


@int8_linear_backward.register_fake
def _(gradient, weight, scale):
    return gradient.new_empty(*gradient.shape[:-1], weight.shape[1])


@register_flop_formula(torch.ops.wuerstchen.int8_linear)
def _flops(x, weight, *_, out_shape=None, **__) -> int:
    """FLOPs of the matrix product, as torch counts a linear layer."""
    return 2 * math.prod(x) * weight[0]


def _keep(ctx, inputs, output):
    _, weight, scale, _ = inputs
    ctx.save_for_backward(weight, scale)


def _backward(ctx, gradient):
    return int8_linear_backward(gradient, *ctx.saved_tensors), None, None, None


int8_linear.register_autograd(_backward, setup_context=_keep)
