"""Options: every spelling of SGLang Diffusion, files, precedence, and one sentence for each mistake."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from tinydiff import config, environment, flags, unsupported
from tinydiff.records import UserError

DATA = Path(__file__).parent / "data"

CLI_PAGE = """\
model_path: FastVideo/FastHunyuan-diffusers
prompt: A beautiful woman in a red dress walking down a street
output_path: outputs/
num_gpus: 2
sp_size: 2
tp_size: 1
num_frames: 45
height: 720
width: 1280
num_inference_steps: 6
seed: 1024
fps: 24
precision: bf16
vae_precision: fp16
vae_tiling: true
vae_sp: true
enable_torch_compile: false
"""


def sentence(argv: list[str]) -> UserError:
    with pytest.raises(UserError) as caught:
        config.parse(argv)
    assert "\n" not in str(caught.value)
    return caught.value


def test_without_options_every_choice_is_the_models():
    made = config.parse([])
    assert made == config.Options()
    assert made.model.model_path == "tinydiff/shapes"
    assert made.sampling.seed == (42,)
    assert made.sampling.height is made.sampling.num_inference_steps is made.sampling.guidance_scale is None
    with pytest.raises(FrozenInstanceError):
        made.sampling.height = 3  # type: ignore[misc]


def test_dashes_underscores_and_equals_signs_are_one_spelling():
    wanted = config.parse(["--num-inference-steps", "7", "--guidance-scale", "2.5"])
    assert wanted.sampling.num_inference_steps == 7 and wanted.sampling.guidance_scale == 2.5
    assert config.parse(["--num_inference_steps=7", "--guidance_scale=2.5"]) == wanted


@pytest.mark.parametrize(
    ("argv", "truth"),
    [
        (["--vae-tiling"], True),
        (["--vae-tiling", "true"], True),
        (["--vae-tiling=False"], False),
        (["--vae_tiling", "false"], False),
    ],
)
def test_a_switch_stands_alone_or_says_true_or_false(argv: list[str], truth: bool):
    assert config.parse(argv).model.vae_tiling is truth
    assert config.parse([*argv, "--prompt", "a"]).model.vae_tiling is truth


def test_several_values_and_repeated_flags():
    assert config.parse(["--prompt", "a red circle", "a star"]).sampling.prompt == ("a red circle", "a star")
    assert config.parse(["--prompt=--odd"]).sampling.prompt == ("--odd",)
    assert config.parse(["--seed", "1", "2", "--num-outputs", "2"]).sampling.seed == (1, 2)
    assert config.parse(["--dmd-denoising-steps", "1000,757,522"]).sampling.dmd_denoising_steps == (
        1000,
        757,
        522,
    )
    assert config.parse(["--height", "64", "--height", "96"]).sampling.height == 96


@pytest.mark.parametrize(
    ("name", "height", "width"),
    [("720p", 720, 1280), ("1080p", 1080, 1920), ("2k", 1440, 2560), ("4k", 2160, 3840)],
)
def test_size_shorthands(name: str, height: int, width: int):
    sampling = config.parse([f"--{name}"]).sampling
    assert (sampling.height, sampling.width) == (height, width)
    assert config.parse([f"--{name}", "false"]).sampling.height is None


def test_component_maps_in_every_form():
    wanted = {"text_encoder": "sdpa", "transformer": "flash"}
    dotted = [
        "--component-attention-backends.text_encoder",
        "torch_sdpa",
        "--component-attention-backends.transformer",
        "fa",
    ]
    for argv in (
        ["--component-attention-backends", "text_encoder=torch_sdpa,transformer=fa"],
        ["--component_attention_backends", "text_encoder=torch_sdpa", "transformer=fa"],
        ["--component-attention-backends", json.dumps({"text_encoder": "torch_sdpa", "transformer": "fa"})],
        dotted,
    ):
        assert config.parse(argv).model.component_attention_backends == wanted
    model = config.parse(
        ["--vae-path", "a/b", "--component-paths.text_encoder", "c", "--component-precisions.vae", "fp32"]
    ).model
    assert model.component_paths == {"vae": "a/b", "text_encoder": "c"}
    assert model.component_precisions == {"vae": "fp32"}
    assert config.options({"component_precisions": {"vae": "fp32"}}).model.component_precisions == {
        "vae": "fp32"
    }


def test_output_file_path_is_a_directory_and_a_name():
    output = config.parse(["--output-file-path", "some/where/a.png"]).output
    assert (output.output_path, output.output_file_name) == ("some/where", "a.png")
    output = config.parse(["--output-file-path", "/a.png"]).output
    assert (output.output_path, output.output_file_name) == ("/", "a.png")
    output = config.parse(["--output-file-path", "frames/"]).output
    assert (output.output_path, output.output_file_name) == (".", "frames/")


def test_not_saving():
    assert config.parse([]).output.save_output
    assert config.parse(["--save-output"]).output.save_output
    for argv in (["--no-save-output"], ["--save-output", "false"], ["--output-path", ""], ["--output-path="]):
        assert not config.parse(argv).output.save_output


def test_prompts_from_a_file(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n\n  a star \n")
    for flag in ("--prompt-path", "--prompt-file-path"):
        assert config.parse([flag, str(path)]).sampling.prompt == ("a red circle", "a star")
    assert "prompt_path" in str(sentence(["--prompt-path", str(tmp_path / "none.txt")]))
    assert "either --prompt or --prompt-path" in str(sentence(["--prompt", "a", "--prompt-path", str(path)]))
    (tmp_path / "empty.txt").write_text("\n")
    assert "contains no prompt" in str(sentence(["--prompt-path", str(tmp_path / "empty.txt")]))


def test_the_example_of_the_cli_page_parses(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text(CLI_PAGE)
    made = config.parse(["--config", str(path)])
    assert made.model.model_path == "FastVideo/FastHunyuan-diffusers"
    assert (made.model.dit_precision, made.model.vae_precision, made.model.vae_tiling) == (
        "bf16",
        "fp16",
        True,
    )
    assert made.model.enable_torch_compile is False
    sampling = made.sampling
    assert sampling.prompt == ("A beautiful woman in a red dress walking down a street",)
    assert (
        sampling.num_frames,
        sampling.height,
        sampling.width,
        sampling.num_inference_steps,
        sampling.fps,
    ) == (45, 720, 1280, 6, 24)
    assert sampling.seed == (1024,) and made.output.output_path == "outputs/"
    assert made.ignored == made.refusals == ()
    assert made.parallel == config.ParallelOptions(num_gpus=2, sp_degree=2, tp_size=1, vae_sp=True)


def test_json_and_nested_sections(tmp_path: Path):
    path = tmp_path / "config"
    entries = {
        "prompt": ["a", "b"],
        "seed": [3],
        "height": None,
        "pipeline_config": {"dit-precision": "fp32", "flow_shift": 3},
    }
    path.write_text(json.dumps({**entries, "vae_config": {"use_tiling": True}}, indent="\t"))
    made = config.parse(["--config", str(path)])
    assert made.sampling.prompt == ("a", "b") and made.sampling.seed == (3,) and made.sampling.height is None
    assert (
        made.model.dit_precision == "fp32"
        and made.sampling.flow_shift == 3.0
        and made.model.vae_tiling is True
    )


SIDES = ("vae_config.tile_sample_min_height", "vae_config.tile_sample_min_width")
STRIDES = ("vae_config.tile_sample_stride_height", "vae_config.tile_sample_stride_width")


@pytest.mark.parametrize(
    ("values", "side"),
    [
        (dict.fromkeys(SIDES, 128), 128),
        (dict.fromkeys(SIDES, "512") | dict.fromkeys(STRIDES, 384), 512),
        (dict.fromkeys(SIDES, 256) | dict.fromkeys(STRIDES, 192), None),
        ({STRIDES[0]: 192}, None),
    ],
)
def test_sglangs_tiles_are_a_tile_size(values, side):
    """Its usual side is ours, so it asks for nothing, not even for tiles."""
    assert config.options(values).model.vae_tile_size == side
    words = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert config.parse(["--prompt", "a", *words]).model.vae_tile_size == side


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({SIDES[0]: 128}, f"tiles are square; give {SIDES[0]} 128 and {SIDES[1]} 256 one value"),
        (
            dict.fromkeys(SIDES, 128) | {STRIDES[1]: 64},
            f"{STRIDES[1]}: 64 cannot be used; tiles overlap by a quarter, so here it is 96",
        ),
        (
            dict.fromkeys(SIDES, 128) | {"vae_tile_size": 64},
            f"give either vae_tile_size or {SIDES[0]}, not both",
        ),
        (dict.fromkeys(SIDES, 8), "8 must be at least 64"),
    ],
)
def test_sglangs_tiles_that_ours_cannot_be_are_one_sentence(values, sentence):
    with pytest.raises(UserError) as error:
        config.options(values)
    assert str(error.value).startswith(f"vae_tile_size: {sentence}") and "\n" not in str(error.value)


def test_the_command_line_wins(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "720p: true\nseed: 5\nsave_output: false\n"
        "component_paths: {vae: a, transformer: b}\nprompt: from the file\n"
    )
    made = config.parse(
        ["--height", "64", "--config", str(path), "--no-save-output", "false", "--vae-path", "c"]
    )
    assert (made.sampling.height, made.sampling.width, made.sampling.seed) == (64, 1280, (5,))
    assert made.output.save_output and made.model.component_paths == {"vae": "c", "transformer": "b"}
    prompts = tmp_path / "p.txt"
    prompts.write_text("from the prompt file")
    assert config.parse(["--config", str(path), "--prompt-path", str(prompts)]).sampling.prompt == (
        "from the prompt file",
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("promt: a", "promt: no such key; did you mean 'prompt'?"),
        ("a: [", "neither JSON nor YAML"),
        ("just words", "holds a str"),
        ("", "holds nothing"),
        ("[1]", "holds a list"),
        ("sp_size: 1\nsp_degree: 2", "either sp_size or sp_degree"),
        ("height: tall", "height: 'tall' is not an integer"),
        ("height: 1.5", "height: 1.5 is not an integer"),
        ("height: true", "height: takes an integer"),
        ("vae_tiling: 3", "vae_tiling: 3 is not true or false"),
        ("prompt: {a: b}", "prompt: {'a': 'b'} is not a string"),
        ("config: other.yaml", "config: no such key"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, words: str):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert words in str(sentence(["--config", str(path)]))


def test_files_that_cannot_be_read(tmp_path: Path):
    assert "no such file" in str(sentence(["--config", str(tmp_path / "none.yaml")]))
    assert "cannot be read" in str(sentence(["--config", str(tmp_path)]))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    assert "is not text" in str(sentence(["--config", str(tmp_path / "bytes")]))
    assert "takes one string" in str(sentence(["--config"]))


@pytest.mark.parametrize(
    ("argv", "field", "words"),
    [
        (["--promt", "a"], "promt", "--promt: no such flag; did you mean '--prompt'?"),
        (["--vea-path", "a"], "vea_path", "did you mean '--vae-path'?"),
        (["a", "red", "circle"], "prompt", "every value follows its flag"),
        (["--height"], "height", "was given no value"),
        (["--prompt"], "prompt", "was given none"),
        (["--height", "1", "2"], "height", "takes one value and was given '1' '2'"),
        (["--height", "x"], "height", "'x' is not an integer"),
        (["--height", "0"], "height", "0 must be at least 1"),
        (["--num-inference-steps", "0"], "num_inference_steps", "0 must be at least 1 and at most 1000"),
        (["--num-inference-steps", "-3"], "num_inference_steps", "-3 must be at least 1"),
        (["--num-frames", "0"], "num_frames", "at least 1"),
        (["--guidance-scale", "nan"], "guidance_scale", "nan is not a finite number"),
        (["--guidance-scale", "inf"], "guidance_scale", "inf is not a finite number"),
        (["--guidance-scale", "-1"], "guidance_scale", "-1.0 must be at least 0"),
        (["--guidance-scale-2", "much"], "guidance_scale_2", "'much' is not a number"),
        (["--boundary-ratio", "1.5"], "boundary_ratio", "at least 0 and at most 1"),
        (["--flow-shift", "0"], "flow_shift", "0.0 must be above 0"),
        (["--seed", "-1"], "seed", "-1 must be at least 0"),
        (["--seed", "1", "2"], "seed", "2 are given for 1 outputs of each prompt; give 1"),
        (
            ["--dmd-denoising-steps", "1000,1001"],
            "dmd_denoising_steps",
            "1001 must be at least 0 and at most 1000",
        ),
        (["--output-compression", "101"], "output_compression", "at most 100"),
        (["--vae-tiling", "maybe"], "vae_tiling", "'maybe' is not true or false"),
        (["--720p", "maybe"], "720p", "'maybe' is not true or false"),
        (["--720p", "--height", "8"], "height", "either --720p or --height"),
        (["--save-output", "--no-save-output"], "save_output", "either --save-output or --no-save-output"),
        (["--image-path", "nowhere.png"], "image_path", "'nowhere.png' is not a file"),
        (
            ["--attention-backend", "flsh"],
            "attention_backend",
            "not one of sdpa, flash, cudnn, efficient, math; did you mean 'flash'?",
        ),
        (
            ["--attention-backend", "sage_attn"],
            "attention_backend",
            "'sage_attn' is not supported yet; choose one of sdpa",
        ),
        (["--component-attention-backends", "vae"], "component_attention_backends", "must be pairs"),
        (
            ["--component-attention-backends", "vae=fast"],
            "component_attention_backends.vae",
            "'fast' is not one of",
        ),
        (["--component-attention-backends", "{"], "component_attention_backends", "is not a JSON object"),
        (["--vae-precision", "fp8"], "vae_precision", "'fp8' is not one of fp32, fp16, bf16"),
        (["--backend", "difusers"], "backend", "did you mean 'diffusers'?"),
        (["--diffusers-kwargs", "{"], "diffusers_kwargs", "is not a JSON object"),
        (["--diffusers-kwargs", "a"], "diffusers_kwargs", "must be pairs such as clip_skip=1"),
        (
            ["--encoder-parallel", "dp"],
            "encoder_parallel",
            "'dp' is not supported yet; choose one of auto, fold, replicate",
        ),
        (["--num-gpus", "0"], "num_gpus", "0 must be at least 1"),
        (["--cfg-parallel-size", "4"], "cfg_parallel_size", "4 must be at least 1 and at most 2"),
        (["--dist-timeout", "0"], "dist_timeout", "0 must be at least 1"),
        (["--dp", "2", "--dp-size", "2"], "data_parallel_size", "either --dp or --dp-size"),
        (["--log-level", "loud"], "log_level", "'loud' is not one of debug"),
        (
            ["--prompt", "a", "b", "--output-file-name", "c.png"],
            "output_file_name",
            "names the output of one prompt and 2 are given",
        ),
        (["--prompt-path", "prompts.csv"], "prompt_path", "must be a .txt file"),
    ],
)
def test_each_mistake_is_one_sentence(argv: list[str], field: str, words: str):
    error = sentence(argv)
    assert error.field == field
    assert words in str(error)


def test_given_images_are_files_urls_or_data(tmp_path: Path):
    path = tmp_path / "a.png"
    path.touch()
    images = [str(path), "https://example.com/a.png", "data:image/png;base64,AA=="]
    assert config.parse(["--image-path", *images]).sampling.image_path == tuple(images)
    assert config.options({"image_path": path}).sampling.image_path == (str(path),)


def test_every_flag_of_sglang_is_known():
    names = (DATA / "sglang_flags.txt").read_text().split()
    assert len(names) > 300
    for name in names:
        try:
            config.normalise([name, "1"])
        except UserError as error:
            assert "no such flag" not in str(error), name


@pytest.mark.parametrize(
    "argv",
    [
        ["--kv-gather-degree", "1"], ["--hsdp-shard-dim", "1"], ["--vae-config.use-parallel-decode"],
        ["--lora-merge-mode", "auto"], ["--lora-scale", "1.0"], ["--performance-mode", "auto"],
        ["--enable-teacache", "false"],
        ["--warmup-mode", "off"], ["--adjust-frames", "true"],
        ["--quality", "lossless"],
        ["--component-direct-gpu-weight-loading.vae", "false"], ["--embedded-cfg-scale", "6.0"],
    ],
)  # fmt: skip
def test_a_missing_feature_may_be_turned_off(argv: list[str]):
    assert config.parse(argv) == config.Options()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--kv-gather-degree", "4"],
            "kv_gather_degree: '4' cannot be used; not supported yet: HSDP, KV gathering",
        ),
        (["--hsdp-shard-dim", "2"], "several GPUs"),
        (["--enable-nccl-nvls"], "several GPUs"),
        (["--quantization-rank", "32"], "quantisation"),
        (["--component-direct-gpu-weight-loading.vae"], "'vae=True'"),
        (["--enable-teacache"], "not supported yet: step caches"),
        (["--enable-teacache"], "step caches"),
        (["--profile"], "profiling"),
        (["--cfg-renorm-min", "0.7"], "renormalisation"),
    ],
)
def test_a_missing_feature_is_refused_in_one_sentence(argv: list[str], words: str):
    [line] = config.parse(argv).refusals
    assert words in line and "; not supported yet: " in line


def test_server_flags_are_noted():
    argv = ["--host", "::", "--port", "30010", "--webui", "--disagg-role", "server"]
    assert config.parse(argv).ignored == (
        "host", "port", "webui", "disagg_role",
    )  # fmt: skip


def test_no_name_has_two_meanings():
    kinds = [
        list(config.NAMES),
        list(flags.SERVER),
        list(unsupported.OPTIONS),
        list(flags.ALIASES),
        list(flags.SIZES),
    ]
    names = [name for kind in kinds for name in kind]
    assert len(names) == len(set(names))
    assert set(flags.ALIASES.values()) <= {*config.NAMES, *unsupported.OPTIONS, "prompt_path"}


def test_library_values_are_read_as_they_are():
    made = config.options(
        {"prompt": "", "seed": 3, "image_path": (), "guidance_scale": 2, "height": None}
        | {"image_path": "data:,"}
    )
    assert (
        made.sampling.prompt == ("",) and made.sampling.seed == (3,) and made.sampling.guidance_scale == 2.0
    )
    with pytest.raises(UserError, match="no such key"):
        config.options({"hight": 3})
    with pytest.raises(UserError, match=r"height: .* is not an integer"):
        config.options({"height": Path("a")})


def test_a_seed_of_one_is_a_number_not_a_switch():
    assert config.options({"prompt": "x", "seed": 1}).sampling.seed == (1,)


def test_seeds_of_each_prompt():
    two = config.options({"prompt": ["a", "b"], "seed": 7, "num_outputs_per_prompt": 3}).sampling
    assert config.seeds(two, 0) == config.seeds(two, 1) == (7, 8, 9)
    listed = config.options({"prompt": ["a", "b"], "seed": [5, 3], "num_outputs_per_prompt": 2}).sampling
    assert config.seeds(listed, 0) == config.seeds(listed, 1) == (5, 3)
    each = config.options({"prompt": ["a", "b"], "seed": [1, 2, 3, 4], "num_outputs_per_prompt": 2}).sampling
    assert (config.seeds(each, 0), config.seeds(each, 1)) == ((1, 2), (3, 4))


def test_options_of_ranks():
    made = config.parse(
        [
            "--num-gpus=8",
            "--sp-size=2",
            "--dp=2",
            "--enable-cfg-parallel",
            "--encoder-parallel=fold",
            "--dist-init-addr=a:1",
        ]
    )
    assert made.parallel == config.ParallelOptions(
        num_gpus=8,
        sp_degree=2,
        data_parallel_size=2,
        enable_cfg_parallel=True,
        encoder_parallel="fold",
        dist_init_addr="a:1",
    )
    assert (
        config.parse(["--num-gpus", "1"]).refusals == ()
        and config.parse([]).parallel == config.ParallelOptions()
    )


def test_the_place_that_a_launcher_gave_is_read(monkeypatch):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert environment.under_torchrun() is None
    for name, value in zip(names, ("5", "8", "1", "4", "node0", "29500"), strict=True):
        assert environment.under_torchrun() is None  # all of them, or it was another program's
        monkeypatch.setenv(name, value)
    assert environment.under_torchrun() == environment.LaunchedRank(
        rank=5, size=8, local_rank=1, local_size=4
    )


LAUNCHED = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("RANK", "", "RANK is ''"),
        ("RANK", "2", "RANK is 2; of 2 processes the last is 1"),
        ("RANK", "-1", "RANK is '-1'"),
        ("WORLD_SIZE", "x", "WORLD_SIZE is 'x'"),
        ("WORLD_SIZE", "9" * 5000, "WORLD_SIZE is "),
        ("LOCAL_RANK", "7", "LOCAL_RANK is 7; of 2 processes the last is 1"),
        ("LOCAL_WORLD_SIZE", "1_0", "LOCAL_WORLD_SIZE is '1_0'"),
        ("MASTER_PORT", "abc", "MASTER_PORT is 'abc'"),
        ("MASTER_PORT", "70000", "MASTER_PORT must be between 1 and 65535"),
    ],
)
def test_a_variable_that_no_launcher_sets_so_is_one_sentence(name, value, says, monkeypatch):
    for each, usual in (LAUNCHED | {name: value}).items():
        monkeypatch.setenv(each, usual)
    with pytest.raises(UserError) as caught:
        environment.under_torchrun()
    sentence = str(caught.value)
    assert caught.value.field == name and says in sentence and "\n" not in sentence and len(sentence) < 500
