"""The MLP with kernels against the plain one."""

import importlib
import importlib.util
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from wuerstchen.models.mlp import ChannelMLP, GlobalResponseNorm, mlp_tail


def pair(
    width: int, dropout: float = 0.0, dtype: torch.dtype = torch.float32
) -> tuple[ChannelMLP, ChannelMLP]:
    """The same weights with kernels, and plain in double precision."""
    torch.manual_seed(0)
    plain = ChannelMLP(24, width, dropout).double()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(0, 0.3)
    fast = ChannelMLP(24, width, dropout)
    fast.load_state_dict(plain.state_dict())
    return fast.to("cuda", dtype), plain.cuda()


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
class TestKernels:
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
    )
    @pytest.mark.parametrize(("grid", "width"), [((5, 7), 33), ((24, 24), 64), ((1, 1), 16), ((64, 96), 16)])
    def test_output_and_gradients_equal_double_precision(self, grid, width, dtype, tolerance):
        """Odd widths and grids leave tiles half empty. An input of zeros must not give NaN."""
        fast, plain = pair(width, dtype=dtype)
        x = torch.randn(3, *grid, 24, device="cuda", dtype=torch.float64)
        x[0] = 0
        direction = torch.randn(3, *grid, width, device="cuda", dtype=torch.float64)
        found = []
        for network, kind in ((fast, dtype), (plain, torch.float64)):
            given = x.to(kind).requires_grad_()
            output = network(given)
            (output * direction.to(kind)).sum().backward()
            found.append([output, given.grad, *(p.grad for p in network.parameters())])
        for ours, theirs in zip(*found, strict=True):
            assert (ours.double() - theirs).abs().max() <= tolerance * theirs.abs().max()

    def test_dropout_is_the_same_in_the_backward_pass_and_differs_between_calls(self):
        fast, _ = pair(64, dropout=0.25)
        hidden = torch.randn(2, 1000, 256, device="cuda", requires_grad=True)
        gamma, beta = (torch.randn(256, device="cuda") for _ in range(2))
        eye, zero = torch.eye(256, device="cuda"), torch.zeros(256, device="cuda")
        seeds = [torch.tensor(s, device="cuda") for s in ((1, 2), (1, 2), (3, 2), (1, 4))]
        drawn = [mlp_tail(hidden, gamma, beta, eye, zero, seed, 0.25)[0] for seed in seeds]
        kept = [y != 0 for y in drawn]
        assert torch.equal(drawn[0], drawn[1])
        for other in kept[2:]:
            assert (kept[0] == other).float().mean().item() == pytest.approx(0.75**2 + 0.25**2, abs=0.01)
        assert not torch.equal(kept[0][0], kept[0][1])  # images of a batch differ
        for axis in (0, 1):
            assert (kept[0].float().mean((0, axis + 1)) - 0.75).abs().max() < 0.1
        whole, _ = mlp_tail(hidden, gamma, beta, eye, zero, None, 0.0)
        torch.testing.assert_close(drawn[0], torch.where(kept[0], whole / 0.75, 0.0), rtol=1e-5, atol=1e-5)
        (slope,) = torch.autograd.grad(drawn[0].sum(), hidden)
        (masked,) = torch.autograd.grad((whole * kept[0] / 0.75).sum(), hidden)
        torch.testing.assert_close(slope, masked, rtol=1e-4, atol=1e-4)
        assert not torch.equal(
            fast(torch.ones(1, 4, 4, 24, device="cuda")), fast(torch.ones(1, 4, 4, 24).cuda())
        )

    def test_compiled_operators_have_the_same_gradients(self):
        """Compilers use the operators' fake versions. Wrong shapes or dtypes would fail here."""
        shapes = ((2, 64, 24), (128, 24), (128,), (128,), (32, 128), (32,))
        x, first, gamma, beta, weight, bias = (
            torch.randn(s, device="cuda", requires_grad=True) for s in shapes
        )

        def run():
            half = [tensor.bfloat16() for tensor in (x @ first.T, weight, bias)]
            return mlp_tail(half[0], gamma, beta, *half[1:], None, 0.0)[0].float().square().sum()

        inputs = (x, first, gamma, beta, weight, bias)
        found = [torch.autograd.grad(loss(), inputs) for loss in (run, torch.compile(run))]
        for a, b in zip(*found, strict=True):
            assert (a - b).abs().max() <= 2e-2 * a.abs().max()


def test_a_deprecation_warning_inside_torchs_compiler_is_ignored(monkeypatch):
    """The compiler imports this module if oneDNN is built in, which would fail the first test that
    compiles."""
    monkeypatch.delitem(sys.modules, "torch.utils.mkldnn", raising=False)
    importlib.import_module("torch.utils.mkldnn")


def test_the_operator_counts_its_operations():
    """Otherwise MFU would miss a third of Stage C."""
    hidden, gamma, weight, bias = (torch.empty(s, device="meta") for s in ((2, 5, 16), (16,), (4, 16), (4,)))
    with FlopCounterMode(display=False) as counter:
        output, norm = mlp_tail(hidden, gamma, gamma, weight, bias, None, 0.0)
    assert (output.shape, norm.shape) == ((2, 5, 4), (2, 16))
    assert counter.get_total_flops() == 2 * 2 * 5 * 16 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_channels_compete_by_their_norm_over_the_grid(dtype):
    """Equations 1 to 3 of arXiv 2301.00808 in fp64; in fp16 the sum of squares, 10^6, is out of range."""
    x = torch.randn(2, 40, 25, 6, dtype=torch.float64) * 30
    x[1] = 0
    norm = GlobalResponseNorm(6).to(dtype)
    torch.nn.init.normal_(norm.gamma)
    torch.nn.init.normal_(norm.beta)
    given = x.to(dtype).requires_grad_()
    output = norm(given)
    lengths = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    relative = lengths / (lengths.mean(dim=-1, keepdim=True) + 1e-6)
    expected = norm.gamma.double() * x * relative + norm.beta.double() + x
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3}[dtype]
    assert (output.double() - expected).abs().max() <= tolerance * expected.abs().max()
    output.float().sum().backward()
    assert given.grad.isfinite().all()  # the square root has no gradient at zero
