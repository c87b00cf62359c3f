"""Tiny diffusers pipelines with random weights, one of every family that can be a teacher."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import torch
import transformers

WIDTH = 8  # hidden size of every text encoder
DDIM = {"beta_schedule": "scaled_linear", "timestep_spacing": "trailing", "clip_sample": False}


def unet(**options) -> diffusers.UNet2DModel:
    return diffusers.UNet2DModel(**{
        "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 8), "layers_per_block": 1,
        "norm_num_groups": 4, "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, **options,
    }).eval()  # fmt: skip


def vae(channels: int = 4, **options) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        latent_channels=channels, block_out_channels=(8, 8), norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **options,
    ).eval()  # fmt: skip


def vq() -> diffusers.VQModel:
    return diffusers.VQModel(
        block_out_channels=(8, 8), norm_num_groups=4, num_vq_embeddings=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip


def text_unet(context: int = WIDTH, **options) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=context,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **options,
    ).eval()  # fmt: skip


def clip(folder: Path, projected: bool = False):
    """A text encoder and its tokenizer of single bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    words = [*alphabet, *(c + "</w>" for c in alphabet), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=WIDTH, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=len(words) - 1,
    )  # fmt: skip
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config).eval(), tokenizer


def t5(width: int = WIDTH):
    """A text encoder and its tokenizer of single letters."""
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram

    letters = ["<pad>", "</s>", "<unk>", *"▁abcdefghijklmnopqrstuvwxyz"]
    config = transformers.T5Config(vocab_size=len(letters), d_model=width, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    inner = Tokenizer(Unigram([(letter, -1.0) for letter in letters], unk_id=2))
    tokenizer = transformers.T5TokenizerFast(tokenizer_object=inner, extra_ids=0, model_max_length=16)
    return transformers.T5EncoderModel(config).eval(), tokenizer


def randomized(net: torch.nn.Module) -> torch.nn.Module:
    """Add noise to all weights. Weights that start at 0 would hide the effect of a condition."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net


def ldm(folder, autoencoder):
    n = autoencoder.config.latent_channels
    return diffusers.LDMPipeline(autoencoder, unet(in_channels=n, out_channels=n), diffusers.DDIMScheduler(**DDIM))


def dit(folder):
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        num_embeds_ada_norm=1000, norm_num_groups=4,
    )  # fmt: skip
    return diffusers.DiTPipeline(randomized(net).eval(), vae(), diffusers.DDIMScheduler(**DDIM))


def sd(folder):
    encoder, tokenizer = clip(folder / "words")
    return diffusers.StableDiffusionPipeline(
        vae(), encoder, tokenizer, text_unet(), diffusers.DDIMScheduler(**DDIM, prediction_type="v_prediction", steps_offset=1),
        None, None, requires_safety_checker=False,
    )  # fmt: skip


def xl(folder):
    one, tokenizer = clip(folder / "words")
    two, _ = clip(folder / "words", projected=True)
    net = text_unet(
        2 * WIDTH, addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=WIDTH + 24
    )
    return diffusers.StableDiffusionXLPipeline(vae(), one, two, tokenizer, tokenizer, net, diffusers.DDIMScheduler(**DDIM))


def sd3(folder):
    one, tokenizer = clip(folder / "words", projected=True)
    two, _ = clip(folder / "words", projected=True)
    three, letters = t5(2 * WIDTH)
    net = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=2 * WIDTH, caption_projection_dim=16, pooled_projection_dim=2 * WIDTH, pos_embed_max_size=8,
    )  # fmt: skip
    autoencoder = vae(scaling_factor=1.5, shift_factor=0.06)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.StableDiffusion3Pipeline(
        randomized(net).eval(), scheduler, autoencoder, one, tokenizer, two, tokenizer, three, letters
    )


def pixart(folder, pipeline, **options):
    encoder, tokenizer = t5()
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16}
    small = {**heads, "num_layers": 1, "norm_num_groups": 4, "sample_size": 8}
    net = diffusers.PixArtTransformer2DModel(**small | options, in_channels=4, out_channels=8, caption_channels=WIDTH)
    return pipeline(tokenizer, encoder, vae(), randomized(net).eval(), diffusers.DDIMScheduler(**DDIM))


FAMILIES = {
    "latent of a VQ model": lambda f: ldm(f, vq()),
    "latent of a KL model": lambda f: ldm(f, vae(scaling_factor=0.7)),
    "DiT": dit,
    "Stable Diffusion": sd,
    "SDXL": xl,
    "SD3": sd3,
    "PixArt Sigma": lambda f: pixart(f, diffusers.PixArtSigmaPipeline, use_additional_conditions=False),
    "PixArt Alpha": lambda f: pixart(f, diffusers.PixArtAlphaPipeline, use_additional_conditions=False),
}
PROMPTS = ["a cat", "two dogs on a boat", "blue"]
