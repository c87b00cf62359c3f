"""Tiny pipelines of flow transformers with random weights, one of every class that has a record."""

from __future__ import annotations

from pathlib import Path

import diffusers
import transformers
from pipelines import WIDTH, clip, randomized, t5, vae

SHIFT = diffusers.FlowMatchEulerDiscreteScheduler
TINY = {
    "hidden_size": WIDTH, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 4,
}  # fmt: skip


def letters(template: bool = False):
    """A tokenizer of single bytes, with the chat template of a user's message alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(alphabet, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    if template:
        made.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    return made


def flux(folder: Path, guidance: bool = False):
    one, tokenizer = clip(folder / "words")
    two, other = t5()
    net = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=1, joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8), guidance_embeds=guidance,
    )  # fmt: skip
    scheduler = SHIFT(use_dynamic_shifting=True) if guidance else SHIFT(shift=1.0)
    return diffusers.FluxPipeline(scheduler, vae(shift_factor=0.1), one, tokenizer, two, other, randomized(net).eval())


def chroma(folder: Path):
    encoder, tokenizer = t5()
    net = diffusers.ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=1, joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=8, approximator_layers=1,
    )  # fmt: skip
    return diffusers.ChromaPipeline(SHIFT(shift=3.0), vae(shift_factor=0.1), encoder, tokenizer, randomized(net).eval())


def flux2(folder: Path):
    """FLUX.2 klein, whose text encoder is the simpler one."""
    config = transformers.Qwen3Config(**TINY | {"num_hidden_layers": 28}, vocab_size=300)
    net = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=1,
        joint_attention_dim=3 * WIDTH, timestep_guidance_channels=8, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKLFlux2(
        latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4, sample_size=16, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
    autoencoder.bn.running_mean.normal_(0, 0.3)
    autoencoder.bn.running_var.uniform_(0.5, 2)
    encoder, scheduler = transformers.Qwen3ForCausalLM(config).eval(), SHIFT(use_dynamic_shifting=True)
    return diffusers.Flux2KleinPipeline(scheduler, autoencoder, encoder, letters(True), randomized(net).eval())


def qwen_image(folder: Path):
    vision = {
        "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": WIDTH, "fullatt_block_indexes": [0],
    }  # fmt: skip
    text = {key: value for key, value in TINY.items() if key != "head_dim"} | {
        "vocab_size": 300, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1], "rope_type": "default"},
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    net = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=1, joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.3, -0.2, 0.1, 0.5], latents_std=[0.7, 1.5, 2.0, 0.9],
    ).eval()  # fmt: skip
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    scheduler = SHIFT(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02)
    return diffusers.QwenImagePipeline(scheduler, autoencoder, encoder, letters(), randomized(net).eval())


def z_image(folder: Path):
    encoder = transformers.Qwen3Model(transformers.Qwen3Config(**TINY, vocab_size=300)).eval()
    net = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=1, n_kv_heads=1, cap_feat_dim=WIDTH, axes_dims=[4, 4, 8],
        axes_lens=[600, 16, 16],
    )  # fmt: skip
    return diffusers.ZImagePipeline(SHIFT(shift=3.0), vae(shift_factor=0.1), encoder, letters(True), randomized(net).eval())


def gemma():
    return transformers.Gemma2Model(transformers.Gemma2Config(**TINY, vocab_size=300)).eval()


def sana(folder: Path):
    net = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=WIDTH, sample_size=16,
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=4, scaling_factor=0.4,
        encoder_block_types="ResBlock", decoder_block_types="ResBlock", encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()), upsample_block_type="interpolate",
        downsample_block_type="Conv",
    ).eval()  # fmt: skip
    scheduler = SHIFT(shift=3.0)
    return diffusers.SanaPipeline(letters(), gemma(), autoencoder, randomized(net).eval(), scheduler)


def lumina2(folder: Path):
    net = diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=16, num_layers=1, num_refiner_layers=1, num_attention_heads=1, num_kv_heads=1,
        multiple_of=16, axes_dim_rope=(4, 4, 8), axes_lens=(300, 16, 16), cap_feat_dim=WIDTH,
    )  # fmt: skip
    scheduler = SHIFT(use_dynamic_shifting=True)
    autoencoder = diffusers.AutoencoderKL(  # 8 times smaller, which the pipeline takes for granted
        latent_channels=4, block_out_channels=(4,) * 4, norm_num_groups=4, shift_factor=0.1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).eval()  # fmt: skip
    return diffusers.Lumina2Pipeline(randomized(net).eval(), scheduler, autoencoder, gemma(), letters())


FLOWS = {
    "Flux schnell": flux,
    "Flux dev": lambda f: flux(f, guidance=True),
    "Chroma": chroma,
    "Flux2 klein": flux2,
    "Qwen-Image": qwen_image,
    "Z-Image": z_image,
    "Sana": sana,
    "Lumina2": lumina2,
}
