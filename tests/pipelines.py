"""Tiny diffusers pipelines of random weights, of every family that can be a teacher."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

WIDTH = 8  # of every text encoder


def unet(**options) -> UNet2DModel:
    return UNet2DModel(**{
        "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 8), "layers_per_block": 1,
        "norm_num_groups": 4, "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, **options,
    }).eval()  # fmt: skip


def vae(channels: int = 4, **options) -> AutoencoderKL:
    return AutoencoderKL(
        latent_channels=channels, block_out_channels=(8, 8), norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **options,
    ).eval()  # fmt: skip


def vq() -> VQModel:
    return VQModel(
        block_out_channels=(8, 8), norm_num_groups=4, num_vq_embeddings=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip


def text_unet(context: int = WIDTH, **options) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=context,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **options,
    ).eval()  # fmt: skip


def clip(folder: Path, projected: bool = False):
    """A text encoder and its tokenizer, of bytes without merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    words = [*alphabet, *(c + "</w>" for c in alphabet), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=WIDTH, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=len(words) - 1,
    )  # fmt: skip
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval(), tokenizer


def t5(width: int = WIDTH):
    """A text encoder and its tokenizer, of single letters."""
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram

    letters = ["<pad>", "</s>", "<unk>", *"▁abcdefghijklmnopqrstuvwxyz"]
    config = T5Config(vocab_size=len(letters), d_model=width, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    inner = Tokenizer(Unigram([(letter, -1.0) for letter in letters], unk_id=2))
    tokenizer = T5TokenizerFast(tokenizer_object=inner, extra_ids=0, model_max_length=16)
    return T5EncoderModel(config).eval(), tokenizer


def randomized(net: torch.nn.Module) -> torch.nn.Module:
    """Without the weights that start at 0, behind which a condition would not be seen."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net
