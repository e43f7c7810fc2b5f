"""The published v2 model's shape with random weights, for measuring without its files."""

import tokenizers
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from wuerstchen.models.cascade import Cascade, CascadeSettings
from wuerstchen.models.decoder import Decoder, DecoderConfig
from wuerstchen.models.prior import Prior, PriorConfig
from wuerstchen.models.text import TextEncoder
from wuerstchen.models.vqgan import VQGAN, VQGANConfig


def random_v2(device: torch.device) -> Cascade:
    """All networks at published size on ``device`` in fp32, 3.1 billion weights that make something of noise.

    What starts at zero is drawn too, so that every layer counts.
    """
    torch.manual_seed(0)
    with device:
        prior = _stirred(Prior(PriorConfig()))
        decoder = _stirred(Decoder(DecoderConfig()))
        vqgan = _stirred(VQGAN(VQGANConfig()))
        text = _clip(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20)
        decoder_text = _clip(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
        )
    tokenizer = letters()
    return Cascade(
        settings=CascadeSettings(),
        vqgan=vqgan,
        decoder=decoder,
        prior=prior,
        text_encoder=TextEncoder.from_transformers(text, tokenizer),
        decoder_text_encoder=TextEncoder.from_transformers(decoder_text, tokenizer),
    )


def letters() -> CLIPTokenizer:
    """CLIP's tokenizer with letters in place of words, and CLIP's numbers for begin and end."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    vocab |= {"<|startoftext|>": 49_406, "<|endoftext|>": 49_407}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def _clip(**sizes: int) -> CLIPTextModel:
    config = CLIPTextConfig(hidden_act="gelu", projection_dim=sizes["hidden_size"], **sizes)
    return CLIPTextModel(config).eval().requires_grad_(False)


def _stirred(network: nn.Module) -> nn.Module:
    """Draws what starts at zero. The last layers stay near it: they then say that all is noise.

    Larger ones would claim the opposite, and sampling with guidance would leave every range.
    """
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if not parameter.any():
                inputs = parameter[0].numel() if parameter.ndim > 1 and len(parameter) > 1 else 10
                last = name.startswith(("out.", "clf."))
                parameter.normal_(std=(0.02 if last else 0.3) / inputs**0.5)
    return network.eval().requires_grad_(False)
