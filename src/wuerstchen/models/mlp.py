"""The MLP of every convolution block: linear, GELU, global response norm, dropout, linear.

On NVIDIA GPUs ``ChannelMLP`` runs the kernels of ``models.fused.mlp_kernels``, through two custom operators
that support compilation and autograd.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from wuerstchen.device import runs_triton


class GlobalResponseNorm(nn.Module):
    """ConvNeXt V2, equations 1 to 3 (arXiv 2301.00808): channels compete by their norm over the grid."""

    weight_decay = False
    """Gamma and beta are scales and shifts, although they have several axes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, width))

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        norm = _norm_over_grid(x)
        relative = norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)
        # γ·(x·relative) + β + x in one pass over x, the widest tensor of the network.
        return torch.addcmul(self.beta, x, (1 + self.gamma * relative).to(x.dtype))


def _norm_over_grid(x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b 1 1 c"]:
    """In at least fp32: with 256×256 positions of mean square 1, a sum of squares overflows fp16.

    The gradient is 0 for an all-zero channel, not the NaN of a plain square root.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    if x.device.type == "cpu":  # torch's norm over these axes is twenty times slower there
        squares = x.to(exact).square().sum(dim=(1, 2), keepdim=True)
        return squares.clamp_min(torch.finfo(exact).tiny).sqrt()
    # One axis after the other: reducing both at once on CUDA takes three times the memory of x.
    columns = torch.linalg.vector_norm(x, dim=2, keepdim=True, dtype=exact)
    return torch.linalg.vector_norm(columns, dim=1, keepdim=True)


class ChannelMLP(nn.Sequential):
    """``c_in`` to 4·``c`` to ``c`` channels, with dropout before the last layer."""

    def __init__(self, c_in: int, c: int, dropout: float) -> None:
        wide = 4 * c
        super().__init__(
            nn.Linear(c_in, wide),
            nn.GELU(),
            GlobalResponseNorm(wide),
            nn.Dropout(dropout),
            nn.Linear(wide, c),
        )

    def forward(self, x: Float[Tensor, "b h w c_in"]) -> Float[Tensor, "b h w c"]:
        hidden = self[0](x)
        if not self._has_kernels(hidden):
            return self[4](self[3](self[2](self[1](hidden))))
        norm, last, p = self[2], self[4], self[3].p if self[3].training else 0.0
        seed = torch.randint(2**31, (2,), device=x.device) if p else None
        weight, bias = last.weight.to(hidden.dtype), last.bias.to(hidden.dtype)
        gamma, beta = norm.gamma.flatten(), norm.beta.flatten()
        output, _ = mlp_tail(hidden.flatten(1, 2), gamma, beta, weight, bias, seed, p)
        return output.unflatten(1, hidden.shape[1:3])

    def _has_kernels(self, hidden: Tensor) -> bool:
        """Whether the kernels can be used: not if an adapter has replaced a layer, if a weight is offloaded,
        or in double precision."""
        gelu, norm, dropout, last = self[1], self[2], self[3], self[4]
        return (
            hidden.is_cuda
            and hidden.dtype != torch.float64
            and type(gelu) is nn.GELU
            and gelu.approximate == "none"
            and type(norm) is GlobalResponseNorm
            and type(dropout) is nn.Dropout
            and type(last) is nn.Linear
            and norm.gamma.device == last.weight.device == hidden.device
            and (torch.compiler.is_compiling() or runs_triton(hidden.device))
        )


@torch.library.custom_op("wuerstchen::mlp_tail", mutates_args=())
def mlp_tail(
    hidden: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    p: float,
) -> tuple[Tensor, Tensor]:
    """GELU, norm, dropout and last layer on ``hidden`` (b, n, c). Also returns the norms (b, c).

    The backward pass reads only ``hidden`` and the norms, and computes the rest again.
    """
    from wuerstchen.models.fused import mlp_kernels as kernels

    hidden = hidden.contiguous()
    with torch.cuda.device_of(hidden):  # Triton launches kernels on the current device
        y, norm = kernels.forward(hidden, gamma, beta, seed, p)
    return F.linear(y, weight, bias), norm


@mlp_tail.register_fake
def _(hidden, gamma, beta, weight, bias, seed, p):
    b, _, c = hidden.shape
    return hidden.new_empty(*hidden.shape[:2], len(weight)), gamma.new_empty(b, c, dtype=torch.float32)


@register_flop_formula(torch.ops.wuerstchen.mlp_tail)
def _flops(hidden, gamma, beta, weight, *_, out_shape=None, **__) -> int:
    """FLOPs of the matrix product, as torch counts a linear layer."""
    return 2 * hidden[0] * hidden[1] * hidden[2] * weight[0]


@torch.library.custom_op("wuerstchen::mlp_tail_backward", mutates_args=())
def mlp_tail_backward(
    gradient: Tensor,
    hidden: Tensor,
    norm: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of hidden, gamma, beta, weight and bias."""
    from wuerstchen.models.fused import mlp_kernels as kernels

    hidden, gradient = hidden.contiguous(), gradient.contiguous()
    with torch.cuda.device_of(hidden):
        y, dh, dgamma, dbeta = kernels.backward(gradient @ weight, hidden, norm, gamma, beta, seed, p)
    rows = gradient.flatten(0, 1)
    return dh, dgamma.to(gamma.dtype), dbeta.to(beta.dtype), rows.T @ y.flatten(0, 1), rows.sum(0)


@mlp_tail_backward.register_fake
def _(gradient, hidden, norm, gamma, beta, weight, seed, p):
    bias = weight.new_empty(len(weight))
    return tuple(map(torch.empty_like, (hidden, gamma, beta, weight, bias)))


def _keep(ctx, inputs, output):
    hidden, gamma, beta, weight, _, seed, p = inputs
    ctx.save_for_backward(hidden, output[1], gamma, beta, weight, seed)
    ctx.p = p


def _backward(ctx, gradient, _):
    hidden, norm, gamma, beta, weight, seed = ctx.saved_tensors
    found = mlp_tail_backward(gradient, hidden, norm, gamma, beta, weight, seed, ctx.p)
    return (*found, None, None)


mlp_tail.register_autograd(_backward, setup_context=_keep)
