"""The error and the speed of 8-bit weights and activations: the error in Stages B and C of a trained model,
and on a GPU the time of the published model's matrix products.

    python benchmarks/eight_bits.py [--model FOLDER]

Errors are relative to fp32, for one forward pass on the latents of four prompts at three noise levels. Only
the inputs and weights of the linear layers in blocks are rounded and everything else is fp32, so the errors
are lower bounds. For comparison, fp16 runs everything in fp16. Images are compared by the mean difference in
8-bit values. The model in the package is stored in int8 with a scale per row, so its int8 errors come from
the activations only.
"""

import argparse
import copy
import json
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measuring import call_seconds
from torch import Tensor, nn

from wuerstchen.diffusion.objective import predictions_for_sampling
from wuerstchen.diffusion.samplers import draw_noise
from wuerstchen.images import to_tensor
from wuerstchen.models.cascade import Cascade
from wuerstchen.pipeline import Wuerstchen, load

PROMPTS = ["a noto emoji of a cat", "a 3D render of a green car", "a flat illustration of a pizza", "a tree"]
TIMES = (0.9, 0.5, 0.1)
SHAPES = {  # rows, inputs and outputs of the matrix products of an image at 1024² → their number
    (1152, 1536, 6144): 928,
    (1152, 6144, 1536): 928,
    (1306, 1536, 4608): 928,
    (1152, 1536, 1536): 928,
    (1024, 1280, 5120): 336,
    (1024, 5120, 1280): 336,
    (1101, 1280, 3840): 336,
    (1024, 1280, 1280): 336,
    (256, 1280, 5120): 96,
    (256, 5120, 1280): 96,
    (4096, 640, 2560): 96,
    (4096, 2560, 640): 96,
    (4173, 640, 1920): 96,
    (16384, 320, 1280): 96,
    (16384, 1280, 320): 96,
}

Rounding = Callable[[Tensor], Tensor]


def float8(x: Tensor, dim: int | None) -> Tensor:
    """Rounds to e4m3, with one scale per tensor or per row."""
    scale = x.abs().amax(*(() if dim is None else (dim, True))).clamp_min(1e-12) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def int8(x: Tensor) -> Tensor:
    """Rounds to int8, with one scale per row."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return (x / scale).round() * scale


def rotation(width: int) -> Tensor:
    """An orthogonal matrix that spreads outliers over channels.

    It is block-diagonal, with Hadamard matrices of the largest power of two that divides ``width``.
    """
    side = width & -width
    matrix = torch.ones(1, 1)
    while len(matrix) < side:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.block_diag(*[matrix / math.sqrt(side)] * (width // side))


class Rounded(nn.Module):
    """A linear layer that rounds its inputs and weights before the product."""

    def __init__(self, layer: nn.Linear, inputs: Rounding, weights: Rounding, rotates: bool) -> None:
        super().__init__()
        self.inputs, self.bias = inputs, layer.bias
        self.rotation = rotation(layer.in_features) if rotates else None
        weight = layer.weight.float() if self.rotation is None else layer.weight.float() @ self.rotation
        self.weight = nn.Parameter(weights(weight), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.rotation is None else x @ self.rotation
        return F.linear(self.inputs(x), self.weight, self.bias)


def float8_by_row(x: Tensor) -> Tensor:
    return float8(x, -1)


def float8_by_tensor(x: Tensor) -> Tensor:
    return float8(x, None)


SCHEMES: dict[str, tuple[Rounding, Rounding, bool]] = {
    "fp8, a scale per tensor": (float8_by_tensor, float8_by_tensor, False),
    "fp8, a scale per row": (float8_by_row, float8_by_row, False),
    "int8, a scale per row": (int8, int8, False),
    "int8, a scale per row, rotated": (int8, int8, True),
}


def rounded(cascade: Cascade, scheme: str) -> Cascade:
    new = copy.deepcopy(cascade)
    for network in (new.prior, new.decoder):
        for module in list(network.modules()):
            for name, child in list(module.named_children()):
                # Skip the few input and output layers, which take hardly any time.
                if isinstance(child, nn.Linear) and child.in_features >= 64:
                    setattr(module, name, Rounded(child, *SCHEMES[scheme]))
    return new


@torch.no_grad()
def predictions(
    model: Wuerstchen, semantic_latents: Tensor, latents: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """The outputs of Stages C and B on inputs noised to TIMES."""
    cascade = model.cascade
    encoded = cascade.text_encoder.encode(PROMPTS)
    mask = encoded.mask if cascade.settings.text_mask else None
    context = cascade.prior.context(encoded.states.to(dtype), mask)
    z = cascade.settings.latent_statistics.restore(semantic_latents)
    of_decoder = cascade.text_encoder_of_decoder()
    states = None if of_decoder is None else of_decoder.encode(PROMPTS).states.to(dtype)
    decoder_context = cascade.decoder.context(z, tuple(latents.shape[2:]), states)
    found: list[Tensor] = []
    settings = cascade.settings
    of_stages = (
        (cascade.prior, settings.prior_objective, semantic_latents, context),
        (cascade.decoder, settings.decoder_objective, latents, decoder_context),
    )
    for network, objective, x, given in of_stages:
        outputs, predict = [], predictions_for_sampling(network, objective)
        for time in TIMES:
            noise = draw_noise(x.shape[1:], [torch.Generator().manual_seed(i) for i in range(len(x))])
            t = torch.full((len(x),), time)
            noised = objective.noised(x, noise, t)
            outputs.append(predict(noised.to(dtype), t, given).double())
        found.append(torch.stack(outputs))
    return found


def drawn(model: Wuerstchen) -> Tensor:
    """Images in [0, 1]."""
    return torch.stack([to_tensor(image) for image in model.generate(PROMPTS, seed=1)])


def errors(model_name: str | None) -> dict[str, dict[str, float]]:
    exact = load(model_name, "cpu", precision="float32")
    semantic_latents, latents = [], []
    images = exact.generate(PROMPTS, seed=1)
    with torch.no_grad():
        for image in images:
            pixels = to_tensor(image)[None]
            z = exact.encode(exact.cascade.compressor, pixels)
            semantic_latents.append(exact.cascade.settings.latent_statistics.normalise(z))
            latents.append(exact.cascade.vqgan.encode(pixels))
    x, y = torch.cat(semantic_latents), torch.cat(latents)
    reference, drawn_exactly = predictions(exact, x, y, torch.float32), drawn(exact)

    half = load(model_name, "cpu", precision="float16")
    models = {"fp16": (half, torch.float16)}
    for scheme in SCHEMES:
        models[scheme] = (Wuerstchen(rounded(exact.cascade, scheme), torch.device("cpu")), torch.float32)
    table = {}
    for name, (model, dtype) in models.items():
        c, b = (
            ((found - right).norm() / right.norm()).item()
            for found, right in zip(predictions(model, x, y, dtype), reference, strict=True)
        )
        table[name] = {"c": c, "b": b, "image": 255 * (drawn(model) - drawn_exactly).abs().mean().item()}
        cells = (f"{key} {v:.2e} ({v / table['fp16'][key]:5.1f}×)" for key, v in table[name].items())
        print(f"{name:<34} {'   '.join(cells)}", flush=True)
    return table


def times(device: torch.device) -> dict[str, float]:
    """Milliseconds of the matrix products of an image, by number format."""
    total: dict[str, float] = {}
    for (m, k, n), count in SHAPES.items():
        # Cycle through more buffers than fit into the cache.
        pairs = [(torch.randn(m, k, device=device), torch.randn(n, k, device=device)) for _ in range(12)]
        one, by_row, by_column = (torch.ones(*s, device=device) for s in ((), (m, 1), (1, n)))
        eight, whole_numbers, halves = (
            [(a.to(dtype), b.to(dtype).t()) for a, b in pairs]
            for dtype in (torch.float8_e4m3fn, torch.int8, torch.float16)
        )
        kinds = {
            "fp16": [lambda a=a, b=b: a @ b for a, b in halves],
            "fp8, a scale per tensor": [
                lambda a=a, b=b, s=one: torch._scaled_mm(a, b, s, s, out_dtype=torch.float16)
                for a, b in eight
            ],
            "fp8, a scale per row": [
                lambda a=a, b=b, s=by_row, t=by_column: torch._scaled_mm(a, b, s, t, out_dtype=torch.bfloat16)
                for a, b in eight
            ],
            "int8 (int32 out)": [lambda a=a, b=b: torch._int_mm(a, b) for a, b in whole_numbers],
        }
        for name, calls in kinds.items():
            total[name] = total.get(name, 0.0) + 1000 * count * call_seconds(calls, device)
    for name, ms in total.items():
        print(f"{name:<34} {ms:7.1f} ms for the products of an image, {ms / total['fp16']:.2f}× fp16")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="default: the model in the package")
    options = parser.parse_args()
    found = {"errors": errors(options.model)}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "ms": times(torch.device("cuda"))}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
