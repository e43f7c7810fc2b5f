"""What an adapter file says about itself: its base model, trigger words, training images and licence.

Imports no torch, because the service lists adapters.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from wuerstchen.checkpoints.untrusted_json import parse_json

if TYPE_CHECKING:
    from torch import nn

HEADER = "wuerstchen"
"""The header field with our description, as in ``checkpoints.native``."""
_SAMPLED = 64
"""Values of each tensor that ``weights_hash`` reads."""
_LONGEST = 2000
"""Length limit of a text that is read, in characters. Headers are untrusted."""


@dataclass(frozen=True, kw_only=True)
class AdapterMetadata:
    """A description for people and programs. Empty and 0 mean unknown."""

    title: str = ""
    base_model: str = ""
    """Name or path of the model that the adapter was trained on."""
    base_hash: str = ""
    """``weights_hash`` of that model's Stage C."""
    trigger_words: tuple[str, ...] = ()
    """Words that prompts should contain."""
    images: int = 0
    """Number of different training images."""
    updates: int = 0
    """Number of optimizer steps."""
    licence: str = ""

    def as_header(self) -> dict[str, str]:
        """Header fields: our own, and those of other programs (``modelspec.*`` and kohya's ``ss_*``)."""
        own: dict[str, Any] = {"format": 1, "kind": "lora"}
        for field in fields(self):
            if value := getattr(self, field.name):
                own[field.name] = list(value) if isinstance(value, tuple) else value
        others = {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": "wuerstchen-v2-prior/lora",
            "modelspec.implementation": "diffusers",
            "modelspec.title": self.title,
            "modelspec.trigger_phrase": ", ".join(self.trigger_words),
            "modelspec.license": self.licence,
            "ss_output_name": self.title,
            "ss_sd_model_name": self.base_model,
            "ss_num_train_images": str(self.images or ""),
            "ss_steps": str(self.updates or ""),
        }
        return {HEADER: json.dumps(own)} | {key: value for key, value in others.items() if value}

    @classmethod
    def of_header(cls, header: Mapping[str, str]) -> "AdapterMetadata":
        """Reads a header by ``as_header``, or by programs that write ``modelspec.*`` or ``ss_*``.

        Fields that cannot be read are left empty: nothing here decides how an adapter is applied.
        """
        try:
            own = parse_json(header.get(HEADER, "{}"))
        except ValueError:
            own = {}
        own = own if isinstance(own, dict) else {}
        words = own.get("trigger_words")
        if not isinstance(words, list):
            words = [word.strip() for word in header.get("modelspec.trigger_phrase", "").split(",")]

        def text(name: str, *others: str) -> str:
            found = own.get(name, next((header[key] for key in others if key in header), ""))
            return _clean(found) if isinstance(found, str) else ""

        return cls(
            title=text("title", "modelspec.title", "ss_output_name"),
            base_model=text("base_model", "ss_sd_model_name"),
            base_hash=text("base_hash"),
            trigger_words=tuple(filter(None, (_clean(word) for word in words if isinstance(word, str))))[
                :100
            ],
            images=_count(own.get("images", header.get("ss_num_train_images"))),
            updates=_count(own.get("updates", header.get("ss_steps"))),
            licence=text("licence", "modelspec.license"),
        )


def _clean(text: str) -> str:
    """The text of an untrusted header on one line. Lone surrogates, which no file and no answer can hold, and
    control characters, which would act on a terminal, become spaces."""
    return "".join(c if c.isprintable() else " " for c in text[:_LONGEST]).strip()


def _count(value: object) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 16:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1e15 else 0


def weights_hash(network: "nn.Module") -> str:
    """The SHA-256 hash of a sample of a network's weights, rounded to float16, without its adapters.

    It is the same for float32 and float16 copies of a model, and differs for bfloat16 or quantized copies.
    It reads 64 values of each tensor, so it takes milliseconds.
    """
    import torch  # not above: the service reads descriptions without torch

    state = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in network.state_dict().items()
        if ".lora_" not in name and tensor.is_floating_point()
    }
    digest = hashlib.sha256()
    samples = []
    for name in sorted(state):
        flat = state[name].detach().reshape(-1)
        stride = max(1, flat.numel() // _SAMPLED)
        samples.append(flat[::stride][:_SAMPLED].half())
        digest.update(f"{name} {tuple(state[name].shape)}\n".encode())
    if samples:
        digest.update(torch.cat(samples).cpu().numpy().tobytes())
    return digest.hexdigest()
