"""Records tests/fixtures: small files written by the current code, and the expected results of reading them.

    python scripts/record_fixtures.py                    replaces the archive and expected.json
    python scripts/record_fixtures.py --widen            replays the archive, and raises tolerances in
                                                         expected.json to ten times the differences here

tests/test_fixtures.py replays them with ``replay``. It only reads the results of commands and the files of
runs, so it still works when modules move.
"""

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import lzma
import math
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
ARCHIVE = FOLDER / "fixtures.tar.xz"
EXPECTED = FOLDER / "expected.json"
LIMIT = 300_000
"""Largest size of all fixtures in bytes."""

Values = dict[str, tuple[float, float]]
"""Numbers by name, each with the scale for relative differences."""


def words(text: str) -> list[str]:
    return text.split()


# The smallest networks that their classes allow.
SHAPES = words(
    "--vqgan.bottleneck-blocks 1 --vqgan.embed-dim 4 --vqgan.num-vq-embeddings 16"
    " --compressor.backbone efficientnet_lite0 --compressor.c-latent 2"
    " --previewer.c-in 2 --previewer.c-hidden 3 3 3"
    " --prior.c-in 2 --prior.c 6 --prior.c-r 4 --prior.c-cond 8 --prior.depth 1 --prior.nhead 2"
    " --prior.dropout 0 --decoder.dropout 0"
    " --decoder.c-r 4 --decoder.c-cond 4 --decoder.c-hidden 4 4 --decoder.nhead -1 2 --decoder.blocks 1 1"
    " --decoder.level-config CT CTA --decoder.effnet-embd 2 --decoder.clip-embd 8"
)
V2 = [*SHAPES, *words("--decoder.patch-size 2 --decoder.inject-effnet False True")]
V1 = [*SHAPES, *words("--decoder.num-labels 16 --decoder.c-token 4")]
# Each update is logged and saved. Learning rates are high, so that each update matters.
ALWAYS = words(
    "--image-size 128 --workers 0 --checkpoint-seconds 0 --keep-every 4 --log-every 1 --statistics-images 8"
    " --prior-steps 2 --decoder-steps 2 --no-rehearsal --device cpu"
)
STAGE_A = words(
    "--stage-a.optimization.images 16 --stage-a.optimization.batch-size 4 --stage-a.optimization.warmup 8"
    " --stage-a.adversarial-from 4 --stage-a.discriminator-width 8 --stage-a.discriminator-depth 3"
    " --stage-a.crop 32 --stage-a.optimization.learning-rate 0.01"
)
STAGE_B = words(
    "--stage-b.optimization.images 16 --stage-b.optimization.batch-size 4 --stage-b.optimization.warmup 8"
    " --stage-b.optimization.learning-rate 0.01 --stage-b.compressor-init compressor/compressor.safetensors"
)
STAGE_C = words(
    "--stage-c.optimization.images 16 --stage-c.optimization.batch-size 4 --stage-c.optimization.warmup 8"
    " --stage-c.optimization.learning-rate 0.01"
)


def training(recipe: str, start: str, *more: list[str]) -> list[str]:
    return [
        "train",
        recipe,
        *words(start),
        *ALWAYS,
        *itertools.chain(*more),
        "--preview-prompts",
        "a red square",
    ]


# Layers that are frozen have no state of an optimizer, which takes most of the space.
FROZEN = words("--stage-b.frozen-stride 16")
REFINED = words("--stage-a.refine-images 16 --stage-a.refine-rate 0.01")
AB = "--data images --start-from model-ab"
RUNS: dict[str, tuple[list[str], str, int, tuple[str, ...]]] = {
    "run-a": (training("tiny", "--stages a --data sample", V2, STAGE_A), "a", 8, ()),
    "run-b": (
        training("tiny", f"--stages b --fresh b {AB} --text-encoder encoder", V2, STAGE_B),
        "b",
        8,
        ("images", "encoder", "compressor", "model-ab"),
    ),
    "run-a2": (
        training(
            "tiny", "--stages a b --data images --text-encoder encoder", V2, STAGE_A, STAGE_B, FROZEN, REFINED
        ),
        "a2",
        8,
        ("images", "encoder", "compressor"),
    ),
    "run-c": (training("tiny", f"--stages c --fresh c {AB}", V2, STAGE_C), "c", 8, ("images", "model-ab")),
    "run-c-prepared": (
        training(
            "tiny",
            "--stages c --fresh c --data prepared --start-from model-ab --stored-texts states",
            V2,
            STAGE_C,
        ),
        "c",
        8,
        ("prepared", "model-ab"),
    ),
    "run-v1": (
        training("v1-stage-b", f"--fresh b {AB} --decoder-text-encoder encoder", V1, STAGE_B, FROZEN),
        "b",
        8,
        ("images", "encoder", "compressor", "model-ab"),
    ),
}
"""By name: the command, the stage and the image at which it stops, and other archives that it reads."""
DRAWN: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "v2": (["--model", "model-v2"], ("model-v2",)),
    "v2 without previewer, float16": (["--model", "model-v2-bare"], ("model-v2-bare",)),
    "v2 int8": (["--model", "model-v2-int8"], ("model-v2-int8",)),
    "v1": (["--model", "model-v1"], ("model-v1",)),
    "v1 without previewer": (["--model", "model-v1-bare"], ("model-v1-bare",)),
    "diffusers": (["--model", "model-diffusers"], ("model-diffusers",)),
    "lora": (["--model", "model-v2", "--lora", "lora"], ("model-v2", "lora")),
    "lora of peft": (["--model", "model-v2", "--lora", "lora-peft:0.5"], ("model-v2", "lora-peft")),
}
"""By name: the options of ``generate``, and the archives that it reads."""


def cli(*arguments: str) -> None:
    """Runs a command in this process. Raises ``RuntimeError`` with its output if it fails."""
    from wuerstchen.cli import main

    output = io.StringIO()
    with contextlib.redirect_stderr(output):
        code = main(list(arguments))
    if code:
        raise RuntimeError(f"wuerstchen {' '.join(arguments)} exited with {code}: {output.getvalue()}")


def unpack(folder: Path) -> None:
    """Unpacks each fixture into a folder with its name. Files are sparse where they are zero."""
    with lzma.open(ARCHIVE) as plain, tarfile.open(fileobj=plain) as archive:
        archive.extractall(folder, filter="data")


def replay(name: str, unpacked: Path, folder: Path) -> dict[str, Values]:
    """Resumes a run, draws an image, or reads a prepared set in ``folder``. Returns numbers by kind."""
    parts = (name, *RUNS[name][3]) if name in RUNS else DRAWN[name][1] if name in DRAWN else (name,)
    for part in parts:
        shutil.copytree(unpacked / part, folder / part)
    with contextlib.chdir(folder):
        if name in RUNS:
            return resumed(name)
        return {"image": drawn(DRAWN[name][0])} if name in DRAWN else {"stored": stored(Path(name))}


def resumed(name: str) -> dict[str, Values]:
    """Resumes a run in this folder until its end."""
    command, stage, images, _ = RUNS[name]
    before = len(events(name))
    cli(*command, "--run-dir", name)
    since = events(name)[before:]
    started = {event["stage"]: event["images"] for event in since if event["event"] == "start"}
    if started.get(stage) != images:
        raise RuntimeError(f"{name} must resume from image {images} of stage {stage}, got {started}.")
    return {"losses": losses(since, stage), "tensors": tensors(Path(name) / "model")}


def events(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(name) / "log.jsonl").read_text().splitlines()]


def losses(since: list[dict[str, Any]], stage: str) -> Values:
    """All losses of a stage in a part of the log, including validation."""
    found: Values = {}
    for event in since:
        if event.get("stage") == stage and event["event"] in ("progress", "validation"):
            for key, value in event.items():
                if key.startswith("loss") and isinstance(value, float):
                    found[f"{event['event']} {event['images']} {key}"] = (value, max(abs(value), 1e-2))
    return found


def tensors(model: Path) -> Values:
    """The mean, the norm, and an order-dependent signed sum of each group of tensors in a model."""
    found: Values = {}
    for path in sorted(model.glob("*.safetensors")):
        groups: dict[str, list[np.ndarray]] = {}
        for key, value in sorted(load_file(path).items()):
            if not key.endswith("num_batches_tracked"):
                groups.setdefault(key.partition(".")[0], []).append(value.astype(np.float64).ravel())
        for group, parts in groups.items():
            found |= summary(f"{path.stem} {group}", np.concatenate(parts))
    return found


def summary(name: str, values: np.ndarray) -> Values:
    norm = float(np.linalg.norm(values))
    places = np.arange(len(values), dtype=np.uint64) * np.uint64(2654435761) >> np.uint64(16)
    signs = (places & np.uint64(1)).astype(np.float64) * 2 - 1
    typical = max(norm, 1e-6)
    mean = float(values.mean()), typical / len(values) ** 0.5
    return {
        f"{name} norm": (norm, typical),
        f"{name} mean": mean,
        f"{name} signs": (float(signs @ values), typical),
    }


def drawn(options: list[str]) -> Values:
    """Mean, standard deviation and 16 pixels of an image, in the range from 0 to 1."""
    cli(
        *("generate", "a red square", *options, "--seed", "5", "--size", "128", "--prior-steps", "3"),
        *("--decoder-steps", "3", "--precision", "float32", "--device", "cpu", "--out", "image.png"),
    )
    with Image.open("image.png") as image:
        values = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
    found: Values = {"mean": (float(values.mean()), 0.1), "deviation": (float(values.std()), 0.1)}
    for number, (row, column) in enumerate(np.random.default_rng(3).integers(0, 128, (16, 2))):
        value = float(values[row, column, number % 3])
        found[f"pixel {row} {column} {number % 3}"] = (value, 1.0)
    return found


def stored(folder: Path) -> Values:
    """Summaries of the decoded contents of a prepared set."""
    from wuerstchen.data.prepared import PreparedSet

    opened = PreparedSet(folder, verify=True)
    rows = range(len(opened))
    latents = np.concatenate([opened.semantic_latents(row).astype(np.float64).ravel() for row in rows])
    states = np.concatenate([opened.states(row).astype(np.float64).ravel() for row in rows])
    ids = np.concatenate([opened.tokens(row).astype(np.float64) for row in rows])
    found = summary("maps", latents) | summary("states", states) | summary("tokens", ids)
    found["images"] = (float(len(opened)), 1.0)
    found["held out"] = (float(len(opened.rows("heldout"))), 1.0)
    return found


LEAST = {"losses": 2e-6, "tensors": 2e-5, "image": 5e-3, "stored": 1e-6}
"""Smallest tolerances: a few float32 roundings, and slightly more than one step of an 8-bit pixel."""
REPLAYS = (*RUNS, *DRAWN, "prepared")


def differences(expected: dict[str, Any], found: dict[str, Values]) -> dict[str, tuple[float, str]]:
    """The largest relative difference of each kind, and the name of its number.

    Raises ``ValueError`` if a number is missing on one side.
    """
    largest = {}
    for kind in expected.keys() | found.keys():
        theirs, ours = expected.get(kind, {}), found.get(kind, {})
        if theirs.keys() ^ ours.keys():
            raise ValueError(f"Only one side has these {kind}: {sorted(theirs.keys() ^ ours.keys())}.")
        relative = {name: abs(ours[name][0] - value) / scale for name, (value, scale) in theirs.items()}
        name = max(relative, key=lambda name: float("inf") if math.isnan(relative[name]) else relative[name])
        largest[kind] = (relative[name], name)
    return largest


# The rest makes the fixtures, and imports modules at their current places.


def make_images() -> None:
    """Makes 110 images of coloured rectangles with captions, so that some are held out."""
    rng = np.random.default_rng(0)
    names = {"red": (220, 30, 40), "green": (30, 170, 60), "blue": (40, 70, 210), "yellow": (240, 210, 50)}
    Path("images").mkdir()
    lines = []
    for number in range(110):
        colour = list(names)[number % 4]
        pixels = np.full((24, 24, 3), rng.integers(0, 256, 3), dtype=np.uint8)
        top, left = rng.integers(0, 16, 2)
        pixels[top : top + 8, left : left + 8] = names[colour]
        Image.fromarray(pixels).save(f"images/x{number}.png", optimize=True)
        lines.append(json.dumps({"file_name": f"x{number}.png", "text": f"a {colour} square"}))
    Path("images/metadata.jsonl").write_text("\n".join(lines) + "\n")


def make_encoder() -> None:
    """Makes a CLIP text model with one layer and a vocabulary of letters, with weights of few digits."""
    import tokenizers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from wuerstchen.checkpoints.text_encoder import write_text_encoder
    from wuerstchen.models.text import TextEncoder

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("r", "e"),
        ("re", "d</w>"),
        ("s", "q"),
        ("a", "r"),
        ("ar", "e</w>"),
        ("sq", "u"),
        ("squ", "are</w>"),
    ]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges)]
    vocab = {piece: number for number, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=12)
    count = len(tokenizer)
    ends = {"bos_token_id": count - 2, "eos_token_id": count - 1, "pad_token_id": count - 1}
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = CLIPTextModel(
        CLIPTextConfig(vocab_size=count, max_position_embeddings=12, **sizes, **ends)
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_((torch.randn(parameter.shape) * 4).round() / 8)
            if "token_embedding" in name:
                parameter[: len(pieces) - len(merges)] *= torch.tensor(
                    [
                        piece.removesuffix("</w>") in set("abcdefghijklmnopqrstuvwxyz")
                        for piece in pieces[: -len(merges)]
                    ]
                )[:, None]
    write_text_encoder(TextEncoder.from_transformers(model, tokenizer), Path("encoder"))


NONZERO = 2
"""Channels of each layer of the backbone with weights. All other weights are and stay zero."""


def make_backbone() -> None:
    """Makes an EfficientNet-Lite0, the smallest backbone, with few nonzero channels."""
    from wuerstchen.models.efficientnet import EfficientNetLite

    rng = np.random.default_rng(1)
    state = {}
    for key, value in EfficientNetLite().state_dict().items():
        tensor = np.zeros(tuple(value.shape), dtype=np.int64 if value.ndim == 0 else np.float32)
        if key.endswith("running_var"):
            tensor[:] = 1
        elif value.ndim == 4:
            nonzero = tensor[:NONZERO, :NONZERO]
            nonzero[:] = rng.normal(0, 1.4 / nonzero[0].size ** 0.5, nonzero.shape)
        elif value.ndim == 1 and not key.endswith("running_mean"):
            tensor[:NONZERO] = 1 if key.endswith("weight") else 0.3
        state[key] = tensor
    save_file(state, "backbone.safetensors")


def features_of_images(path: Path) -> np.ndarray:
    """The features of 16 images from a compressor's backbone, (images, features, height, width)."""
    import torch

    from wuerstchen.checkpoints.native import read_network

    views = [Image.open(f"images/x{number}.png").resize((96, 96)) for number in range(16)]
    pixels = torch.tensor(np.stack([np.asarray(view) for view in views]) / 255, dtype=torch.float32)
    return read_network(path)[0].backbone(pixels.permute(0, 3, 1, 2)).numpy()


def make_compressor() -> None:
    """Makes the compressor to start from: that of a short run, with a mapper that ignores zero channels."""
    make_backbone()
    start = "--stages a b --data images --text-encoder encoder --run-dir first"
    short = words("--stage-a.optimization.images 4 --stage-b.optimization.images 4")
    blank = words("--stage-b.compressor-init backbone.safetensors")
    cli(*training("tiny", start, V2, STAGE_A, STAGE_B, short, blank))
    path = "first/model/compressor.safetensors"
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    state = load_file(path)
    state["mapper.0.weight"][:, NONZERO:] = 0
    # Scale to unit standard deviation over the images, as after long training.
    weight = state["mapper.0.weight"][:, :, 0, 0]
    features = features_of_images(Path(path))
    values = np.einsum("of,bfhw->obhw", weight, features).reshape(len(weight), -1)
    weight /= values.std(axis=1, keepdims=True)
    state["mapper.1.running_mean"][:] = values.mean(axis=1) / values.std(axis=1)
    state["mapper.1.running_var"][:] = 1
    Path("compressor").mkdir()
    save_file(state, "compressor/compressor.safetensors", metadata)


def cut(whole: Path, name: str) -> None:
    """Copies the run ``whole`` in the state of a kill right after its checkpoint at the wanted image."""
    _, stage, images, _ = RUNS[name]
    target = Path(name)
    target.mkdir()
    shutil.copy(whole / "run.json", target)
    lines = (whole / "log.jsonl").read_text().splitlines(keepends=True)
    found = [json.loads(line) for line in lines]
    end = next(
        number
        for number, event in enumerate(found, 1)
        if (event["event"], event.get("stage"), event.get("images")) == ("checkpoint", stage, images)
    )
    (target / "log.jsonl").write_text("".join(lines[:end]))
    for started in {event["stage"] for event in found[:end] if event["event"] == "checkpoint"}:
        source = whole / f"stage_{started}"
        checkpoints = sorted(path for path in (source / "checkpoints").iterdir() if path.is_dir())
        kept = source / "checkpoints" / f"{images:012d}" if started == stage else checkpoints[-1]
        shutil.copytree(kept, target / source.name / "checkpoints" / kept.name)
        # Stage A is measured after it ends, and Stage C before it starts.
        if (source / "measured.json").exists() and not started == stage == "a":
            shutil.copy(source / "measured.json", target / source.name)


def dig_holes(path: Path) -> None:
    """Rewrites a file sparsely, without blocks of zeros. GNU tar only detects zeros in sparse files."""
    content, block = path.read_bytes(), 4096
    with open(path, "wb") as file:
        for start in range(0, len(content), block):
            if any(content[start : start + block]):
                file.seek(start)
                file.write(content[start : start + block])
        file.truncate(len(content))


def pack(names: list[str]) -> None:
    """Archives these folders without times and owners. Identical files are stored once.

    Long runs of zeros are sparse in the archive (GNU tar's sparse files) and after unpacking.
    """
    first: dict[bytes, Path] = {}
    for path in sorted(path for name in names for path in Path(name).rglob("*") if path.is_file()):
        same = first.setdefault(hashlib.sha256(path.read_bytes()).digest(), path)
        if same == path:
            dig_holes(path)
        else:
            path.unlink()
            os.link(same, path)
    options = [
        "--sparse",
        "--hole-detection=raw",
        "--format=gnu",
        "--sort=name",
        "--mtime=@0",
        "--numeric-owner",
    ]
    options += ["--owner=0", "--group=0", "--mode=u=rwX,go=rX"]
    plain = subprocess.run(["tar", "--create", *options, *names], check=True, stdout=subprocess.PIPE).stdout
    filters = [
        {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 2}
    ]  # floats: 4 bytes
    ARCHIVE.write_bytes(lzma.compress(plain, filters=filters))


def make_adapters() -> None:
    """Makes adapters for the prior of ``model-v2``, in the layouts of diffusers and of peft."""
    import peft
    import torch

    from wuerstchen.checkpoints.native import read_cascade
    from wuerstchen.lora import save_lora

    torch.manual_seed(7)
    prior = read_cascade(Path("model-v2")).prior
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v", "channelwise.0"])
    network = peft.get_peft_model(prior, config)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    network.save_pretrained("lora-peft")
    Path("lora-peft/README.md").unlink(missing_ok=True)  # peft's template
    layers = peft.get_peft_model_state_dict(network)
    layers = {key.removeprefix("base_model.model."): 0.5 * value for key, value in layers.items()}
    save_lora("lora", layers, config=config.to_dict())


def make_diffusers() -> None:
    """Makes a model in diffusers' layout, for which ``convert`` needs the published settings."""
    import dataclasses

    from wuerstchen.models.cascade import CascadeSettings

    shutil.copytree("model-v2", "published")
    path = Path("published/model.json")
    described = json.loads(path.read_text()) | {"settings": dataclasses.asdict(CascadeSettings())}
    path.write_text(json.dumps(described))
    cli(*words("convert published model-diffusers --layout diffusers --leave-out compressor previewer"))


def make_lively(model: Path) -> None:
    """Replaces barely trained weights with random ones, so that all parts influence the image.

    The weights have few digits, to take less space.
    """
    rng = np.random.default_rng(2)
    for name in ("vqgan", "decoder", "prior", "previewer"):
        path = model / f"{name}.safetensors"
        with safe_open(path, framework="np") as file:
            metadata = file.metadata()
        state = load_file(path)
        for key, value in state.items():
            if "running_" in key or key.endswith("num_batches_tracked"):
                continue
            deviation = 0.2 if value.ndim == 1 else 1 / max(value[0].size, 1) ** 0.5
            if key.startswith(("out.", "clf.", "out_block.")):
                deviation *= 0.3
            value[...] = np.round(rng.normal(0, deviation, value.shape) * 32) / 32
            if key == "out_block.0.bias":
                value[...] = 0.5
        save_file(state, path, metadata)


def make_models() -> None:
    for name in RUNS:
        if name != "run-a2":
            cli(*RUNS[name][0], "--run-dir", f"whole-{name}")
    shutil.copytree("whole-run-c/model", "model-v2")
    make_lively(Path("model-v2"))
    cli(*words("convert model-v2 model-v2-bare --layout native --storage float16 --leave-out previewer"))
    cli(*words("convert model-v2 model-v2-int8 --layout native --storage int8"))
    start = "--data images --start-from whole-run-v1/model --fresh c --text-encoder encoder --run-dir last"
    cli(*training("v1-stage-c", start, V1, STAGE_C))
    shutil.copytree("last/model", "model-v1")
    make_lively(Path("model-v1"))
    cli(*words("convert model-v1 model-v1-bare --layout native --leave-out previewer"))
    make_diffusers()
    make_adapters()


def record() -> None:
    """Makes the archive, and ``expected.json`` by replaying it."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        make_images()
        make_encoder()
        make_compressor()
        cli(*RUNS["run-a2"][0], "--run-dir", "whole-run-a2")
        shutil.copytree("whole-run-a2/model", "model-ab")
        prepare = "data prepare images prepared --model model-ab --size 128 --max-ratio 1 --device cpu"
        cli(*words(prepare), "--text-states", "fp16")
        make_models()
        for name in RUNS:
            cut(Path(f"whole-{name}"), name)
        read = {part for _, parts in DRAWN.values() for part in parts}
        read |= {part for run in RUNS.values() for part in run[3]}
        pack(sorted({*RUNS, *read}))
    found = replay_all()
    images = {
        tuple(value for value, _ in found[name]["image"].values()) for name in ("v2", "lora", "lora of peft")
    }
    if len(images) < 3:
        raise SystemExit("The adapters do not change the image.")
    tolerances = {name: {kind: LEAST[kind] for kind in kinds} for name, kinds in found.items()}
    write_expected({"tolerances": tolerances, **found})
    size = sum(path.stat().st_size for path in FOLDER.iterdir())
    print(f"{size:,} bytes of at most {LIMIT:,}")
    if size > LIMIT:
        raise SystemExit("The fixtures are too large.")


def write_expected(expected: dict[str, Any]) -> None:
    """Writes a line per kind, with eight digits, which is more than any two machines have in common."""
    short = json.loads(json.dumps(expected), parse_float=lambda text: float(f"{float(text):.8g}"))
    parts = []
    for name, kinds in short.items():
        lines = ",\n".join(f"  {json.dumps(kind)}: {json.dumps(values)}" for kind, values in kinds.items())
        parts.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
    EXPECTED.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def replay_all() -> dict[str, dict[str, Values]]:
    found = {}
    with tempfile.TemporaryDirectory() as unpacked:
        unpack(Path(unpacked))
        for name in REPLAYS:
            with tempfile.TemporaryDirectory() as folder:
                began = time.monotonic()
                found[name] = replay(name, Path(unpacked), Path(folder))
                print(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr)
    return found


def widen() -> None:
    """Raises tolerances to ten times the differences on this machine, and prints these."""
    expected = json.loads(EXPECTED.read_text())
    found = replay_all()
    for name, kinds in found.items():
        for kind, (difference, number) in differences(expected[name], kinds).items():
            print(f"{name}: {kind} {difference:.1e} ({number})")
            tolerance = expected["tolerances"][name][kind]
            expected["tolerances"][name][kind] = max(tolerance, float(f"{10 * difference:.1e}"))
    write_expected(expected)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widen", action="store_true", help="raise tolerances (see above)")
    if parser.parse_args().widen:
        widen()
    else:
        record()


if __name__ == "__main__":
    main()
