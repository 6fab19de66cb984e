"""Class name of a component in a checkpoint -> the record that runs it."""

from __future__ import annotations

from tinydiff.models import (
    ernie,
    flux,
    flux2,
    hunyuan_video,
    hunyuan_video15,
    ltx2,
    ltx2_upsampler,
    ovis,
    qwen_image,
    sd3,
    vocoder,
    wan,
    wan_s2v,
    z_image,
)
from tinydiff.models.autoencoders import flux2_tiny, hunyuan, hunyuan15, kl, ltx2_audio, ltx2_video, tiny
from tinydiff.models.autoencoders import wan as wan_vae
from tinydiff.models.encoders import (
    clip_text,
    clip_vision,
    decoder_lm,
    llava_vision,
    ltx2_connectors,
    ltx2_duration,
    qwen_vision,
    siglip_vision,
    t5,
    wav2vec2,
)
from tinydiff.models.encoders.decoder_config import CLASSES
from tinydiff.models.family import Record

RECORDS: dict[str, Record] = {
    "WanTransformer3DModel": wan.FAMILY,
    "WanS2VTransformer3DModel": wan_s2v.FAMILY,
    "WanModel_S2V": wan_s2v.FAMILY,
    "FluxTransformer2DModel": flux.FAMILY,
    "OvisImageTransformer2DModel": ovis.FAMILY,
    "Flux2Transformer2DModel": flux2.FAMILY,
    "ErnieImageTransformer2DModel": ernie.FAMILY,
    "QwenImageTransformer2DModel": qwen_image.FAMILY,
    "ZImageTransformer2DModel": z_image.FAMILY,
    "SD3Transformer2DModel": sd3.FAMILY,
    "LTX2VideoTransformer3DModel": ltx2.FAMILY,
    "LTX2DurationHead": ltx2_duration.FAMILY,
    "HunyuanVideoTransformer3DModel": hunyuan_video.FAMILY,
    "AutoencoderKLLTX2Video": ltx2_video.FAMILY,
    "AutoencoderKLLTX2Audio": ltx2_audio.FAMILY,
    "LTX2TextConnectors": ltx2_connectors.FAMILY,
    "LTX2Vocoder": vocoder.FAMILY,
    vocoder.BWE: vocoder.FAMILY,
    "LTX2LatentUpsamplerModel": ltx2_upsampler.FAMILY,
    "HunyuanVideo15Transformer3DModel": hunyuan_video15.FAMILY,
    "AutoencoderKLWan": wan_vae.FAMILY,
    "AutoencoderKLQwenImage": wan_vae.FAMILY,
    "AutoencoderKLHunyuanVideo": hunyuan.FAMILY,
    "AutoencoderKLHunyuanVideo15": hunyuan15.FAMILY,
    "AutoencoderKL": kl.FAMILY,
    "AutoencoderKLFlux2": kl.FAMILY,
    "AutoencoderTiny": tiny.FAMILY,
    "Flux2TinyAutoEncoder": flux2_tiny.FAMILY,
    "UMT5EncoderModel": t5.FAMILY,
    "T5EncoderModel": t5.FAMILY,
    "CLIPTextModel": clip_text.FAMILY,
    "CLIPTextModelWithProjection": clip_text.FAMILY,
    "CLIPVisionModel": clip_vision.FAMILY,
    "CLIPVisionModelWithProjection": clip_vision.FAMILY,
    "SiglipVisionModel": siglip_vision.FAMILY,
    "Wav2Vec2ForCTC": wav2vec2.FAMILY,
    "Wav2Vec2Model": wav2vec2.FAMILY,
    **dict.fromkeys(CLASSES, decoder_lm.FAMILY),
}

TOWERS: dict[str, Record] = {
    "Qwen2_5_VLForConditionalGeneration": qwen_vision.FAMILY,
    "LlavaForConditionalGeneration": llava_vision.FAMILY,
}
"""Class of a language model with a vision tower in one component -> the tower.

It is loaded as the network "vision" by models that need an input image.
"""
