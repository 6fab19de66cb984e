"""What the options of a model do to a pipeline of diffusers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from peft import LoraConfig

import tinydiff
from tests.runtime import foreign_folders, test_ovis_pipelines
from tinydiff import environment
from tinydiff.config import ModelOptions
from tinydiff.records import UserError
from tinydiff.runtime import foreign_placement, foreign_settings


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    return foreign_folders.stable_diffusion(tmp_path_factory.mktemp("sd") / "tiny-sd")


def image(folder, fields=None, **options):
    model = tinydiff.load(folder, backend="diffusers", **options)
    return tinydiff.generate(model, "x", num_inference_steps=2, **(fields or {})).images[0].astype(int)


def test_each_component_has_the_type_that_is_asked(unet):
    options = {"dit_precision": "bf16", "vae_precision": "fp32", "text_encoder_precisions": ("fp16",)}
    model = tinydiff.load(unet, backend="diffusers", **options)
    types = {name: getattr(model.pipe, name).dtype for name in ("unet", "vae", "text_encoder")}
    assert types == {"unet": torch.bfloat16, "vae": torch.float32, "text_encoder": torch.float16}
    assert model.blueprint.precisions == {"unet": "bf16", "vae": "fp32", "text_encoder": "fp16"}
    assert tinydiff.load(unet, backend="diffusers", component_precisions={"vae": "bf16"}).pipe.vae.dtype == (
        torch.bfloat16
    )


def test_tiling_slicing_attention_and_compiling_reach_the_networks(unet, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    options = {"vae_tiling": True, "vae_slicing": True, "enable_torch_compile": True}
    pipe = tinydiff.load(unet, backend="diffusers", diffusers_attention_backend="native", **options).pipe
    assert pipe.vae.use_tiling and pipe.vae.use_slicing and set(compiled) == {"BasicTransformerBlock"}


def test_an_attention_backend_reaches_every_layer_or_is_refused(unet, tmp_path):
    test_ovis_pipelines.build(tmp_path / "model")
    for backend in ("native", "_native_math"):
        pipe = tinydiff.load(
            tmp_path / "model", backend="diffusers", diffusers_attention_backend=backend
        ).pipe
        layers = [each for each in pipe.transformer.modules() if hasattr(each, "processor")]
        assert len(layers) == 3 and {each.processor._attention_backend.value for each in layers} == {backend}
    with pytest.raises(UserError, match=r"^diffusers_attention_backend: .* native or xformers only"):
        tinydiff.load(unet, backend="diffusers", diffusers_attention_backend="_native_math")


def test_another_autoencoder_takes_the_place_of_the_models_own(unet, tmp_path):
    torch.manual_seed(7)
    other = AutoencoderKL(**foreign_folders.VAE)
    other.save_pretrained(tmp_path / "vae")
    pipe = StableDiffusionPipeline.from_pretrained(unet, vae=other)
    generator = torch.Generator("cpu").manual_seed(42)
    made = pipe("x", num_inference_steps=2, generator=generator, output_type="np").images[0]
    changed = image(unet, vae_path=str(tmp_path / "vae"))
    assert (changed == (made * 255).round()).all() and not (changed == image(unet)).all()
    with pytest.raises(UserError, match=r"^vae_path: diffusers cannot load"):
        tinydiff.load(unet, backend="diffusers", vae_path=str(tmp_path / "nothing"))


def test_a_lora_has_the_strength_of_the_model_or_of_the_request(unet, tmp_path, monkeypatch):
    torch.manual_seed(3)
    pipe = StableDiffusionPipeline.from_pretrained(unet)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(pipe.unet)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=state)
    pipe = StableDiffusionPipeline.from_pretrained(unet)
    pipe.load_lora_weights(tmp_path, adapter_name="ink")
    pipe.set_adapters(["ink"], [0.5])
    generator = torch.Generator("cpu").manual_seed(42)
    made = pipe("x", num_inference_steps=2, generator=generator, output_type="np").images[0]
    expected = (made * 255).round()
    file = str(tmp_path / "pytorch_lora_weights.safetensors")
    plain, loaded = image(unet), {"lora_path": file, "lora_nickname": "ink"}
    assert not (expected == plain).all()
    assert (image(unet, **loaded, lora_scale=0.5) == expected).all()
    assert (image(unet, {"loras": {"ink": 0.5}}, **loaded) == expected).all()
    assert (image(unet, {"loras": {"ink": 0.0}}, **loaded) == plain).all()
    merged = image(unet, **loaded, lora_scale=0.5, lora_merge_mode="merge")
    assert np.abs(merged - expected).max() <= 1 and not (merged == plain).all()
    with pytest.raises(UserError, match=r"^loras: 'ink' is merged"):
        image(unet, {"loras": {"ink": 1.0}}, **loaded, lora_merge_mode="merge")
    monkeypatch.setattr(foreign_settings, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="lora_path: diffusers needs the package peft"):
        foreign_settings.load_loras(pipe, SimpleNamespace(adapters=(1,)))


class Pipe:
    """Writes down how it is placed."""

    def __init__(self):
        self.calls = []
        self._exclude_from_cpu_offload = []

    def to(self, device):
        self.calls.append(("to", device.type))

    def enable_model_cpu_offload(self, device):
        self.calls.append(("model", device.type, tuple(self._exclude_from_cpu_offload)))

    def enable_group_offload(
        self, onload_device, offload_type, num_blocks_per_group, use_stream, exclude_modules
    ):
        self.calls.append(("group", num_blocks_per_group, use_stream, tuple(exclude_modules)))


PARTS = ("text_encoder", "unet", "vae")


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({}, ("to", "cuda")),
        ({"performance_mode": "memory"}, ("model", "cuda", ())),
        ({"performance_mode": "speed"}, ("to", "cuda")),
        ({"text_encoder_cpu_offload": True}, ("model", "cuda", ("unet", "vae"))),
        ({"dit_cpu_offload": True, "vae_cpu_offload": True}, ("model", "cuda", ("text_encoder",))),
        ({"cpu_offload_components": ("all",)}, ("model", "cuda", ())),
        ({"cpu_offload_components": ("none",)}, ("to", "cuda")),
        ({"component_residency": {"vae": "component-offload"}}, ("model", "cuda", ("text_encoder", "unet"))),
        ({"dit_layerwise_offload": True}, ("group", 1, True, ("text_encoder", "vae"))),
        (
            {
                "layerwise_offload_components": ("all",),
                "dit_offload_prefetch_size": 3,
                "pin_cpu_memory": False,
            },
            ("group", 3, False, ()),
        ),
        ({"component_residency": {"dit": "layerwise-offload"}}, ("group", 1, True, ("text_encoder", "vae"))),
    ],
)
def test_offloading_is_diffusers_own(options, call):
    pipe = Pipe()
    foreign_placement.place(pipe, ModelOptions(**options), torch.device("cuda"), PARTS)
    assert pipe.calls == [call]


def test_a_pipeline_that_cannot_be_offloaded_says_so():
    with pytest.raises(UserError, match=r"^dit_cpu_offload: SimpleNamespace cannot be offloaded"):
        options = ModelOptions(dit_cpu_offload=True)
        foreign_placement.place(SimpleNamespace(), options, torch.device("cuda"), PARTS)


def test_offloading_without_a_gpu_is_said_to_have_no_effect(caplog):
    pipe = Pipe()
    with caplog.at_level("INFO", "tinydiff"):
        foreign_placement.place(pipe, ModelOptions(dit_cpu_offload=True), torch.device("cpu"), PARTS)
    assert pipe.calls == [("to", "cpu")] and "offloading has no effect" in caplog.text


@pytest.mark.parametrize("prefix", ["SGLANG", "TINYDIFF"])
def test_the_environment_switches_cache_dit_on(prefix, monkeypatch):
    assert environment.cache_dit() is None
    monkeypatch.setenv(f"{prefix}_CACHE_DIT_ENABLED", "true")
    assert environment.cache_dit() == dict(environment.CACHE_DIT.values())
    monkeypatch.setenv(f"{prefix}_CACHE_DIT_FN", "2")
    monkeypatch.setenv(f"{prefix}_CACHE_DIT_RDT", "0.5")
    monkeypatch.setenv(f"{prefix}_CACHE_DIT_TAYLORSEER", "1")
    told = environment.cache_dit()
    assert told is not None
    assert (told["Fn_compute_blocks"], told["residual_diff_threshold"], told["enable_taylorseer"]) == (
        2,
        0.5,
        True,
    )
    monkeypatch.setenv(f"{prefix}_CACHE_DIT_MC", "x")
    with pytest.raises(UserError, match="CACHE_DIT_MC: 'x' is not an integer"):
        environment.cache_dit()
    monkeypatch.delenv(f"{prefix}_CACHE_DIT_MC")
    monkeypatch.setenv(f"{prefix}_CACHE_DIT_SCM_PRESET", "fast")
    with pytest.raises(UserError, match="SCM_PRESET: step masks are not passed on"):
        environment.cache_dit()


def test_cache_dit_leaves_steps_out(tmp_path, monkeypatch):
    folder, walks = tmp_path / "model", []
    test_ovis_pipelines.build(folder)
    (tmp_path / "cache.yaml").write_text(
        "cache_config: {max_warmup_steps: 1, residual_diff_threshold: 100.0, Fn_compute_blocks: 1}\n"
    )
    for options in ({}, {"cache_dit_config": str(tmp_path / "cache.yaml")}):
        model = tinydiff.load(folder, backend="diffusers", **options)
        last, count = model.pipe.transformer.single_transformer_blocks[-1], []
        last.register_forward_hook(lambda *_, count=count: count.append(1))
        tinydiff.generate(model, "x", height=12, width=20, num_inference_steps=4, guidance_scale=1.0)
        walks.append(len(count))
    plain, cached = walks
    assert plain == 4 and cached < plain
    monkeypatch.setattr(foreign_settings, "find_spec", lambda name: None if name == "cache_dit" else True)
    with pytest.raises(UserError, match=r"^cache_dit_config: the package cache-dit is not installed; `pip"):
        tinydiff.load(folder, backend="diffusers", cache_dit_config=str(tmp_path / "cache.yaml"))


def test_a_quantisation_config_reaches_the_loader_and_its_mistakes_are_reported(unet, tmp_path, monkeypatch):
    file = tmp_path / "quantised.yaml"
    options = {"backend": "diffusers", "diffusers_quantization_config": str(file)}
    for text, words in (
        ("quant_backed: torchao", "did you mean 'quant_backend'?"),
        ("components_to_quantize: [unt]", "did you mean 'unet'?"),
        ("quant_backend: nothing\nquant_kwargs: {a: 1}", "diffusers cannot quantise as"),
        ("[]", "it must hold keys and values"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=r"^diffusers_quantization_config: ") as mistake:
            tinydiff.load(unet, **options)
        assert words in str(mistake.value)
    told = {"quant_backend": "quanto", "quant_kwargs": {"weights_dtype": "int8"}}
    file.write_text(json.dumps(told | {"components_to_quantize": ["unet"]}))
    made = []
    kind = "diffusers.quantizers.pipe_quant_config.PipelineQuantizationConfig"
    monkeypatch.setattr(kind, lambda **entries: made.append(entries))
    tinydiff.load(unet, **options)
    assert made[-1] == told | {"components_to_quantize": ["unet"]}
