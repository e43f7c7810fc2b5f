"""What weights and activations of eight bits would cost and bring: the error in Stages B and C of a trained
model, and on a GPU the time of the published model's matrix products.

    python benchmarks/eight_bits.py [--model FOLDER]

Errors are relative, of one forward pass against fp32, over maps of four prompts noised to three times; only
the inputs and weights of the blocks' linear layers are rounded, and all else is in fp32, so they are lower
bounds. fp16 beside them is everything in fp16. Pictures are compared too, by the mean difference in 8-bit
values. The model in the package is stored in int8 by row: int8's errors there are the activations' alone.
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
SHAPES = {  # rows, inputs and outputs of a picture's products at 1024² → how often they come
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
    """To e4m3 with one scale, or one for each row."""
    scale = x.abs().amax(*(() if dim is None else (dim, True))).clamp_min(1e-12) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def int8(x: Tensor) -> Tensor:
    """With one scale for each row."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return (x / scale).round() * scale


def rotation(width: int) -> Tensor:
    """An orthogonal matrix that spreads outliers over all channels: Hadamard's where there is one, of the
    largest power of two that divides ``width``, repeated along the diagonal."""
    side = width & -width
    matrix = torch.ones(1, 1)
    while len(matrix) < side:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.block_diag(*[matrix / math.sqrt(side)] * (width // side))


class Rounded(nn.Module):
    """A linear layer whose inputs and weights are rounded before they are multiplied."""

    def __init__(self, layer: nn.Linear, inputs: Rounding, weights: Rounding, rotates: bool) -> None:
        super().__init__()
        self.inputs, self.bias = inputs, layer.bias
        self.turn = rotation(layer.in_features) if rotates else None
        weight = layer.weight.float() if self.turn is None else layer.weight.float() @ self.turn
        self.weight = nn.Parameter(weights(weight), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.turn is None else x @ self.turn
        return F.linear(self.inputs(x), self.weight, self.bias)


def rows(x: Tensor) -> Tensor:
    return float8(x, -1)


def whole(x: Tensor) -> Tensor:
    return float8(x, None)


SCHEMES: dict[str, tuple[Rounding, Rounding, bool]] = {
    "fp8, a scale a tensor": (whole, whole, False),
    "fp8, a scale a row": (rows, rows, False),
    "int8, a scale a row": (int8, int8, False),
    "int8, a scale a row, rotated": (int8, int8, True),
}


def rounded(cascade: Cascade, scheme: str) -> Cascade:
    new = copy.deepcopy(cascade)
    for network in (new.prior, new.decoder):
        for module in list(network.modules()):
            for name, child in list(module.named_children()):
                # Not the few that lead into blocks and out of them, which take hardly any time.
                if isinstance(child, nn.Linear) and child.in_features >= 64:
                    setattr(module, name, Rounded(child, *SCHEMES[scheme]))
    return new


@torch.no_grad()
def predictions(model: Wuerstchen, maps: Tensor, latents: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """What Stages C and B predict of maps and latents that are noised to TIMES."""
    cascade = model.cascade
    encoded = cascade.text_encoder.encode(PROMPTS)
    mask = encoded.mask if cascade.settings.text_mask else None
    context = cascade.prior.context(encoded.states.to(dtype), mask)
    z = cascade.settings.latent_statistics.restore(maps)
    of_decoder = cascade.text_encoder_of_decoder()
    states = None if of_decoder is None else of_decoder.encode(PROMPTS).states.to(dtype)
    steering = cascade.decoder.context(z, tuple(latents.shape[2:]), states)
    found: list[Tensor] = []
    settings = cascade.settings
    of_stages = (
        (cascade.prior, settings.prior_objective, maps, context),
        (cascade.decoder, settings.decoder_objective, latents, steering),
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
    """Pictures in [0, 1]."""
    return torch.stack([to_tensor(image) for image in model.generate(PROMPTS, seed=1)])


def errors(model_name: str | None) -> dict[str, dict[str, float]]:
    exact = load(model_name, "cpu", precision="float32")
    maps, latents = [], []
    images = exact.generate(PROMPTS, seed=1)
    with torch.no_grad():
        for image in images:
            pixels = to_tensor(image)[None]
            z = exact.encode(exact.cascade.compressor, pixels)
            maps.append(exact.cascade.settings.latent_statistics.normalise(z))
            latents.append(exact.cascade.vqgan.encode(pixels))
    x, y = torch.cat(maps), torch.cat(latents)
    reference, pictures = predictions(exact, x, y, torch.float32), drawn(exact)

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
        table[name] = {"c": c, "b": b, "picture": 255 * (drawn(model) - pictures).abs().mean().item()}
        cells = (f"{key} {v:.2e} ({v / table['fp16'][key]:5.1f}×)" for key, v in table[name].items())
        print(f"{name:<34} {'   '.join(cells)}", flush=True)
    return table


def times(device: torch.device) -> dict[str, float]:
    """Milliseconds of a picture's products, by kind."""
    total: dict[str, float] = {}
    for (m, k, n), often in SHAPES.items():
        # More than the cache holds, one after the other.
        pairs = [(torch.randn(m, k, device=device), torch.randn(n, k, device=device)) for _ in range(12)]
        one, by_row, by_column = (torch.ones(*s, device=device) for s in ((), (m, 1), (1, n)))
        eight, whole_numbers, halves = (
            [(a.to(dtype), b.to(dtype).t()) for a, b in pairs]
            for dtype in (torch.float8_e4m3fn, torch.int8, torch.float16)
        )
        kinds = {
            "fp16": [lambda a=a, b=b: a @ b for a, b in halves],
            "fp8, a scale a tensor": [
                lambda a=a, b=b, s=one: torch._scaled_mm(a, b, s, s, out_dtype=torch.float16)
                for a, b in eight
            ],
            "fp8, a scale a row": [
                lambda a=a, b=b, s=by_row, t=by_column: torch._scaled_mm(a, b, s, t, out_dtype=torch.bfloat16)
                for a, b in eight
            ],
            "int8 (int32 out)": [lambda a=a, b=b: torch._int_mm(a, b) for a, b in whole_numbers],
        }
        for name, calls in kinds.items():
            total[name] = total.get(name, 0.0) + 1000 * often * call_seconds(calls, device)
    for name, ms in total.items():
        print(f"{name:<34} {ms:7.1f} ms for the products of a picture, {ms / total['fp16']:.2f}× fp16")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="the one in the package if none is named")
    options = parser.parse_args()
    found = {"errors": errors(options.model)}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "ms": times(torch.device("cuda"))}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
