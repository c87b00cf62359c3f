"""Tiny text-to-image pipelines of stock diffusers classes, without training, for 8x8 grey images.

    unet    StableDiffusionPipeline: one CLIP encoder, UNet2DConditionModel, v prediction on the cosine table of `untrained`
    flow    StableDiffusion3Pipeline: two CLIP encoders and no T5, SD3Transformer2DModel, flow matching

Text encoders keep their random orthogonal weights, which separate captions of known words. Tokens are whole words of the captions
that a tokenizer was made for, and single bytes of any other word.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from teachers.students import COSINE_ZERO_SNR
from teachers.teacher import Teacher

LENGTH = 12  # tokens of a prompt
WIDTH = 32  # of a text encoder
CHANNELS, SIDE = 4, 4  # of the latents
LATENTS = CHANNELS * SIDE * SIDE  # numbers of one sample


def autoencoder(seed: int, channels: tuple[int, ...] = (16, 32)) -> Any:
    """Return an AutoencoderKL that maps images [1, 8, 8] to latents [4, 4, 4]."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=CHANNELS, block_out_channels=channels, layers_per_block=1,
        norm_num_groups=8, sample_size=8, shift_factor=0.0,  # which the pipeline of SD3 needs
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def tokenizer(captions: Iterable[str], folder: Path) -> Any:
    """Return a CLIPTokenizer by byte-pair encoding of the captions' words. Its vocab.json and merges.txt are written to ``folder``."""
    from tokenizers import Tokenizer, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.train_from_iterator(captions, trainers.BpeTrainer(end_of_word_suffix="</w>", show_progress=False))
    merges = json.loads(inner.to_str())["model"]["merges"]
    words = [
        *alphabet,
        *(c + "</w>" for c in alphabet),
        *("".join(pair) for pair in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH)


def text_encoder(words: Any, seed: int, projected: bool = False) -> Any:
    """Return a CLIP text encoder of orthogonal random weights for a tokenizer. ``projected``: with the projection that SD3 takes."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH, projection_dim=WIDTH, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(seed)
    encoder = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    for name, weight in encoder.named_parameters():
        if "token_embedding" in name:
            nn.init.normal_(weight)
        elif weight.ndim == 2:
            nn.init.orthogonal_(weight)
    return encoder.eval().requires_grad_(False)


def stable_diffusion(vae: Any, words: Any, seed: int, channels: tuple[int, ...]) -> Any:
    """Return a StableDiffusionPipeline with an untrained network of ``channels`` per resolution."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    encoder = text_encoder(words, seed)
    net = UNet2DConditionModel(
        sample_size=SIDE, in_channels=CHANNELS, out_channels=CHANNELS, block_out_channels=channels,
        layers_per_block=1, norm_num_groups=8, cross_attention_dim=WIDTH, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    table = {**COSINE_ZERO_SNR, "prediction_type": "v_prediction", "timestep_spacing": "trailing", "steps_offset": 1}
    scheduler = DDIMScheduler(**table, clip_sample=False)
    return StableDiffusionPipeline(vae, encoder, words, net, scheduler, None, None, requires_safety_checker=False)  # type: ignore[arg-type]


def stable_diffusion_3(vae: Any, words: Any, seed: int, channels: tuple[int, ...], layers: int = 3) -> Any:
    """Return a StableDiffusion3Pipeline with an untrained transformer of width ``channels[-1]``."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    one, two = (text_encoder(words, seed + i, projected=True) for i in range(2))
    torch.manual_seed(seed)
    net = SD3Transformer2DModel(
        sample_size=SIDE, patch_size=1, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=layers,
        attention_head_dim=16, num_attention_heads=channels[-1] // 16, joint_attention_dim=2 * WIDTH, pooled_projection_dim=2 * WIDTH,
        caption_projection_dim=channels[-1], pos_embed_max_size=SIDE,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler()
    return StableDiffusion3Pipeline(net, scheduler, vae, one, words, two, words, None, None)  # type: ignore[arg-type]


def prepare() -> None:
    """Switch off the progress bars of the libraries. Raises ValueError without transformers, which has tokenizer and text encoder."""
    from diffusers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if find_spec("transformers") is None:
        raise ValueError("text pipelines need the package transformers: pip install transformers")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def load_autoencoder(folder: Path) -> Any:
    """Load the autoencoder that was saved in ``folder``."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(folder, use_safetensors=True, local_files_only=True)


def network_of(pipeline: Any) -> Any:
    """Return the denoising network of a diffusers pipeline."""
    return getattr(pipeline, "unet", None) or pipeline.transformer


PIPELINES: dict[str, Callable[..., Any]] = {"unet": stable_diffusion, "flow": stable_diffusion_3}


class _Bias(TorchFunctionMode):
    """Add ``bias`` [1, S] to the logits of all keys in every attention."""

    def __init__(self, bias: Tensor):
        super().__init__()
        self.bias = bias

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        extra = {"attn_mask": self.bias} if func is nn.functional.scaled_dot_product_attention else {}
        return func(*args, **(kwargs or {}), **extra)


class Merged(nn.Module):
    """Call an SD3Transformer2DModel with its last ``equal`` text tokens, which are all 0, as one token: the same output, sooner.

    Without T5 the pipeline gives 256 tokens of 0. They have no positions and stay equal in all blocks, and n equal keys count as one
    whose logit is log n higher.
    """

    def __init__(self, net: nn.Module, equal: int):
        super().__init__()
        self.net, self.equal = net, equal

    def forward(self, x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        text = text[:, : text.shape[1] - self.equal + 1]
        config: Any = self.net.config
        bias = x.new_zeros(1, x[0, 0].numel() // config["patch_size"] ** 2 + text.shape[1])  # images come first, then text
        bias[0, -1] = math.log(self.equal)
        cond = {"encoder_hidden_states": text, "pooled_projections": pooled}
        with _Bias(bias):
            return self.net(hidden_states=x, timestep=t, return_dict=False, **cond)[0]


def merged(model: Teacher) -> Teacher:
    """Return a model of one of these pipelines with `Merged` where its prompts end in tokens of 0; others unchanged."""
    net, text = inner(model), model.condition(torch.tensor([0]))["text"]
    equal = text.shape[1] - LENGTH
    if not equal:
        return model
    return replace(model, denoiser=replace(model.parametric, net=Merged(net, equal)))


def inner(model: Teacher) -> Any:
    """Return the diffusers network of a model."""
    return getattr(model.parametric.net, "net")  # noqa: B009 (a submodule)
