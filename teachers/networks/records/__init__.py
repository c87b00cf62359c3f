"""One record per class of diffusers network, about 15 lines each. To add one, see CONTRIBUTING.md, "A network of diffusers"."""

from teachers.networks.records import (
    dit,
    flux,
    flux2,
    lumina2,
    pixart,
    qwen_image,
    sana,
    stable_diffusion,
    stable_diffusion_3,
    z_image,
)
from teachers.networks.records.record import Encode, Encoded, Record

RECORDS: dict[str, Record] = {
    "UNet2DConditionModel": stable_diffusion.RECORD,
    "DiTTransformer2DModel": dit.RECORD,
    "PixArtTransformer2DModel": pixart.RECORD,
    "SD3Transformer2DModel": stable_diffusion_3.RECORD,
    "FluxTransformer2DModel": flux.RECORD,
    "ChromaTransformer2DModel": flux.CHROMA,
    "Flux2Transformer2DModel": flux2.RECORD,
    "QwenImageTransformer2DModel": qwen_image.RECORD,
    "ZImageTransformer2DModel": z_image.RECORD,
    "SanaTransformer2DModel": sana.RECORD,
    "Lumina2Transformer2DModel": lumina2.RECORD,
}
ENCODERS: dict[str, Encode] = {name: encode for record in RECORDS.values() for name, encode in record.encoders.items()}

__all__ = ["ENCODERS", "RECORDS", "Encode", "Encoded", "Record"]
