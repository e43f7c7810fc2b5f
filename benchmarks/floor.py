"""A lower bound on the time of an image: its matrix products, attention and convolutions by the best call.

One forward pass of each network with fake tensors records their shapes. Each shape is then timed in several
ways on random data outside the cache, and the fastest way counts. The bound leaves out norms, activations,
sums and kernel launches. It also leaves out depthwise convolutions, which are measured, but are memory-bound.
"""

import contextlib
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from measuring import call_seconds
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from wuerstchen.models.cascade import Cascade
from wuerstchen.models.decoder import Decoder
from wuerstchen.models.prior import Prior
from wuerstchen.models.vqgan import VQGAN

CACHE_BYTES = 160e6  # of buffers used in turn: three times the L2 cache of an H100


@dataclass(frozen=True)
class Product:
    """A product of matrices of shapes (m, k) and (k, n)."""

    dtype: torch.dtype
    m: int
    k: int
    n: int
    kind = "products"

    @property
    def flop(self) -> int:
        return 2 * self.m * self.k * self.n

    def ways(self, device: torch.device) -> Iterator[list[Callable[[], Tensor]]]:
        m, k, n = self.m, self.k, self.n
        sets = _sets([(m, k), (n, k), (n,), (k, n)], self.dtype, device, (m * k + n * k + m * n))
        for library in ("cublas", "cublaslt") if device.type == "cuda" else (None,):
            with _blas(library):
                yield [lambda s=s: F.linear(s[0], s[1], s[2]) for s in sets]
                yield [lambda s=s: F.linear(s[0], s[1]) for s in sets]
                yield [lambda s=s: torch.mm(s[0], s[3]) for s in sets]


@dataclass(frozen=True)
class Attention:
    """Attention from ``positions`` to ``attended`` positions, for ``batch`` images. Masks are ignored."""

    dtype: torch.dtype
    batch: int
    heads: int
    positions: int
    attended: int
    width: int
    kind = "attention"

    @property
    def flop(self) -> int:
        return 4 * self.batch * self.heads * self.positions * self.attended * self.width

    def ways(self, device: torch.device) -> Iterator[list[Callable[[], Tensor]]]:
        q = (self.batch, self.heads, self.positions, self.width)
        k = (self.batch, self.heads, self.attended, self.width)
        sets = _sets([q, k, k], self.dtype, device, 2 * (math.prod(q) + math.prod(k)))
        for backend in (
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.CUDNN_ATTENTION,
        ):
            with sdpa_kernel(backend):
                yield [lambda s=s: F.scaled_dot_product_attention(*s) for s in sets]


@dataclass(frozen=True)
class Convolution:
    dtype: torch.dtype
    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    groups: int
    transposed: bool

    @property
    def kind(self) -> str:
        return "convolutions" if self.groups == 1 else "depthwise"

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        convolve = F.conv_transpose2d if self.transposed else F.conv2d
        return convolve(x, weight, stride=self.stride, padding=self.padding, groups=self.groups)

    @property
    def flop(self) -> int:
        y = self.apply(torch.empty(self.x, device="meta"), torch.empty(self.weight, device="meta"))
        positions = self.x if self.transposed else y.shape
        return 2 * positions[0] * positions[2] * positions[3] * math.prod(self.weight)

    def ways(self, device: torch.device) -> Iterator[list[Callable[[], Tensor]]]:
        sets = _sets([self.x, self.weight], self.dtype, device, 2 * math.prod(self.x))
        for layout in (torch.contiguous_format, torch.channels_last):
            converted = [[tensor.contiguous(memory_format=layout) for tensor in s] for s in sets]
            with torch.backends.cudnn.flags(enabled=True, benchmark=True):
                yield [lambda s=s: self.apply(*s) for s in converted]


Operation = Product | Attention | Convolution


class Recorder(TorchFunctionMode):
    """Counts operations. A convolution of non-overlapping patches counts as a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Operation] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight = args[0], args[1]
            self.counts[Product(x.dtype, x.numel() // x.shape[-1], weight.shape[1], weight.shape[0])] += 1
        elif func is F.scaled_dot_product_attention:
            q, k = args[0], args[1]
            self.counts[Attention(q.dtype, *q.shape[:3], k.shape[2], q.shape[3])] += 1
        elif func is F.conv2d:
            self._convolution(False, *args, **kwargs)
        elif func is F.conv_transpose2d:
            self._convolution(True, *args, **kwargs)
        return func(*args, **kwargs)

    def _convolution(self, transposed: bool, x, weight, bias=None, stride=1, padding=0, *rest) -> None:
        """``rest`` is dilation and groups. If transposed, it is output padding, groups and dilation."""
        groups = rest[1] if len(rest) > 1 else 1
        stride, padding = ((v, v) if isinstance(v, int) else tuple(v) for v in (stride, padding))
        if groups == 1 and stride == tuple(weight.shape[2:]) and not any(padding):
            patch = math.prod(stride)
            k, n = (
                (weight[0].numel(), weight.shape[0]) if not transposed else (len(weight), weight[0].numel())
            )
            m = x.numel() // x.shape[1] // (1 if transposed else patch)
            self.counts[Product(x.dtype, m, k, n)] += 1
            return
        shapes = tuple(x.shape), tuple(weight.shape)
        self.counts[Convolution(x.dtype, *shapes, stride, padding, groups, transposed)] += 1


def record(run: Callable[[], object]) -> Counter[Operation]:
    with Recorder() as recorder, torch.no_grad():
        run()
    return recorder.counts


def forwards(
    cascade: Cascade, dtype: torch.dtype, batch: int, size: tuple[int, int]
) -> dict[str, tuple[Callable[[], object], int]]:
    """The forward passes of an image and how often each runs. All but the text encoders use fake tensors."""
    settings = cascade.settings
    map_size = settings.latent_size(*size)
    fake = FakeTensorMode()
    with fake, _default(dtype):
        prior = Prior(cascade.prior.config).eval()
        decoder = Decoder(cascade.decoder.config).eval()
        vqgan = VQGAN(cascade.vqgan.config).eval()
        factor = vqgan.config.factor
        grid = (size[1] // factor, size[0] // factor)
        x = torch.empty(2 * batch, prior.config.c_in, *map_size, dtype=dtype)
        latents = torch.empty(batch, decoder.config.c_in, *grid, dtype=dtype)
        text = torch.empty(2 * batch, 77, prior.config.c_cond, dtype=dtype)
        decoder_text = torch.empty(batch, 77, decoder.config.clip_embd, dtype=dtype)
        t, two_t = (torch.empty(n, dtype=torch.float32) for n in (batch, 2 * batch))
        with torch.no_grad():
            context = prior.context(text)
            decoder_context = decoder.context(x[:batch], grid, decoder_text)

    def faked(run: Callable[[], object]) -> Callable[[], object]:
        def within() -> None:
            with fake:
                run()

        return within

    return {
        "text encoder": (lambda: cascade.text_encoder.encode([""] * 2 * batch), 1),
        "text of Stage C": (faked(lambda: prior.context(text)), 1),
        "step of Stage C": (faked(lambda: prior(x, two_t, context)), settings.prior_steps),
        "text encoder of Stage B": (lambda: cascade.decoder_text_encoder.encode([""] * batch), 1),
        "text and latents of Stage B": (faked(lambda: decoder.context(x[:batch], grid, decoder_text)), 1),
        "step of Stage B": (faked(lambda: decoder(latents, t, decoder_context)), settings.decoder_steps),
        "decode": (faked(lambda: vqgan.decode(latents)), 1),
    }


def best_seconds(operation: Operation, device: torch.device) -> float:
    """The time of the fastest way on this machine."""
    found = []
    ways = operation.ways(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # backends warn when they do not apply
        for calls in ways:
            # Skip ways without a kernel for this shape or device.
            with contextlib.suppress(RuntimeError):
                found.append(call_seconds(calls, device))
    if not found:
        raise RuntimeError(f"{operation} cannot run on this device. Leave the part floor out.")
    return min(found)


def measure_floor(
    cascade: Cascade, device: torch.device, dtype: torch.dtype, batch: int, size: tuple[int, int]
) -> dict[str, dict[str, float]]:
    """Milliseconds and FLOP of each part of an image by kind, and of the whole image."""
    seconds: dict[Operation, float] = {}
    parts: dict[str, dict[str, float]] = {}
    kinds = ("products", "attention", "convolutions")
    total = dict.fromkeys(("tflop", "ms", *kinds, "depthwise"), 0.0)
    for name, (run, times) in forwards(cascade, dtype, batch, size).items():
        part = dict.fromkeys(total, 0.0)
        for operation, count in record(run).items():
            if operation not in seconds:
                seconds[operation] = best_seconds(operation, device)
            part[operation.kind] += 1000 * count * seconds[operation]
            part["tflop"] += count * operation.flop / 1e12
        part["ms"] = sum(part[kind] for kind in kinds)
        parts[name] = part
        for key in total:
            total[key] += times * part[key]
    return {**parts, "image": total}


def _sets(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device, elements: int
) -> list[list[Tensor]]:
    """Buffers to use in turn: more than fit into the cache, or two on a CPU."""
    count = min(max(math.ceil(CACHE_BYTES / (elements * dtype.itemsize)), 2), 64)
    if device.type != "cuda":
        count = 2
    return [[torch.randn(s, device=device, dtype=dtype) for s in shapes] for _ in range(count)]


@contextlib.contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _blas(library: str | None) -> Iterator[None]:
    if library is None:
        yield
        return
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(library)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)
