"""Memory and time at the published v2 sizes, compared with diffusers on the same GPU in the same process.

    python benchmarks/full_size.py [--images 2]

Weights are random. Measures one 1024×1024 image with all networks on the GPU, and with one network at a time
on the GPU, with the published sampling: 29 guided steps of Stage C and 12 of Stage B. Both sides run eagerly.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version

import torch
from measuring import free
from random_model import PROMPT, diffusers_draw, diffusers_pipeline, random_v2

from wuerstchen.pipeline import LowMemory, Wuerstchen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", "--pictures", type=int, default=2, help="timed after a first one")
    parser.add_argument("--skip-layer", action="store_true", help="skip the slow offloading by layer")
    options = parser.parse_args()
    cuda = torch.device("cuda")
    cascade = random_v2(cuda)
    for network in cascade.networks().values():
        network.to("cpu", torch.float16)
    rows = {}

    def measure(name: str, drawn: Callable[[int], object], images: int = options.images) -> None:
        drawn(0)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        times = []
        for seed in range(1, images + 1):
            began = time.perf_counter()
            drawn(seed)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        peak = torch.cuda.max_memory_allocated() / 2**30
        rows[name] = {"gib": round(peak, 2), "seconds": round(statistics.median(times), 2)}
        print(f"{name:<44} {peak:6.2f} GiB {rows[name]['seconds']:7.2f} s per image", flush=True)

    layers: list[LowMemory] = ["stage"] if options.skip_layer else ["stage", "layer"]
    for low_memory in layers:
        model = Wuerstchen(cascade, cuda, low_memory=low_memory)
        measure(f"wuerstchen, low memory by {low_memory}", partial(draw, model), 1)
        model.residence.release()
        free()
    pipe = diffusers_pipeline(cascade)
    pipe.enable_model_cpu_offload()
    measure("diffusers, enable_model_cpu_offload", lambda seed: diffusers_draw(pipe, seed), 1)
    pipe = None
    free()

    for network in cascade.networks().values():
        network.to(cuda)
    pipe = diffusers_pipeline(cascade).to(cuda)
    measure("diffusers, all on the GPU", lambda seed: diffusers_draw(pipe, seed))
    pipe = None
    free()
    model = Wuerstchen(cascade, cuda)
    measure("wuerstchen, all on the GPU", partial(draw, model))

    ours, theirs = rows["wuerstchen, low memory by stage"], rows["diffusers, enable_model_cpu_offload"]
    print(f"memory, one network at a time: {ours['gib'] / theirs['gib']:.2f} × diffusers")
    ours, theirs = rows["wuerstchen, all on the GPU"], rows["diffusers, all on the GPU"]
    print(f"time, all on the GPU: {ours['seconds'] / theirs['seconds']:.2f}× diffusers")
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    print(json.dumps({"gpu": torch.cuda.get_device_name(), **versions, "rows": rows}))


def draw(model: Wuerstchen, seed: int) -> object:
    return model.generate(PROMPT, seed=seed)


if __name__ == "__main__":
    main()
