"""From a model's components to a model in memory.

First the JSON files are checked, then the weights are loaded.

A `Blueprint` comes from a few JSON files and touches no device, so a request is refused before gigabytes are
moved.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import cast

import torch

from tinydiff.config import ModelOptions
from tinydiff.entries import Entries
from tinydiff.io.sources import Checkpoint, Component
from tinydiff.io.tokenizer import Tokenizer, load_tokenizer
from tinydiff.io.variants import has
from tinydiff.io.weights import load_weights
from tinydiff.models import registry
from tinydiff.models.classes import RECORDS, TOWERS
from tinydiff.models.encoders import decoder_lm
from tinydiff.models.family import Autoencoder, Denoiser, Encoder, Record
from tinydiff.models.recipe import Net
from tinydiff.models.registry import ReleasedModel
from tinydiff.ops.attention import BACKENDS, serves
from tinydiff.ops.network import Config
from tinydiff.ops.store import Berth
from tinydiff.parallel.dtensors import Sharding
from tinydiff.parallel.plan import ALONE, Group, Plan
from tinydiff.parallel.ranks import Ranks, weights_mesh
from tinydiff.records import UserError, check_known
from tinydiff.residency import OnOom, PerformanceMode
from tinydiff.runtime import components, loras, offload, quantisation
from tinydiff.runtime.component_config import preprocessed, read_config
from tinydiff.runtime.components import SHIPPED as SHIPPED
from tinydiff.runtime.foreign import Foreign, Untyped
from tinydiff.runtime.net_plan import NetPlan, here
from tinydiff.runtime.weight_plans import network_placements
from tinydiff.sampling import solvers

log = logging.getLogger(__name__)

TILE = 256
"""Side in pixels of the tiles of an autoencoder, where no option says it."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PRECISIONS = {dtype: name for name, dtype in DTYPES.items()}


VISION = "vision"
"""The network of a tower that has no component of its own."""
FILES = (
    *("scheduler", "tokenizer", "tokenizer_2", "tokenizer_3", "pe_tokenizer"),
    *("guider", "image_processor", "processor", "feature_extractor", "audio_processor"),
)
"""Components without weights. The last four only describe the preprocessing of an encoder."""
UNREAD = ("prompt_enhancer",)
"""Components that nothing here runs: the pipelines that have them work without."""
GUIDER = {
    "enabled": True,
    "guidance_rescale": 0.0,
    "start": 0.0,
    "stop": 1.0,
    "use_original_formulation": False,
}
"""What guider_config.json must say. Its scale is not read: the registry has the model's."""
WRITER = "pe"
"""The component that rewrites prompts: a language model that some pipelines have, with its tokenizer."""


NEEDED = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
"""Components of every model."""


def _capability() -> tuple[int, int] | None:
    """The compute capability of the GPU; None on a CPU."""
    return torch.cuda.get_device_capability() if here().type == "cuda" else None


@dataclass(frozen=True)
class Blueprint:
    """A model before its weights are loaded."""

    row: ReleasedModel
    named: bool
    """Whether the row was found by name. If it was found by shape only, the directory's own scheduler
    settings count.
    """
    nets: Mapping[str, NetPlan[Record]]
    """Component -> its network."""
    tokenizers: Mapping[str, Component]
    scheduler: Entries
    """`scheduler_config.json`."""
    options: Entries
    """The pipeline's own settings in `model_index.json`."""
    compiled: bool
    tiling: bool | None
    """Whether the autoencoder runs on tiles, as the options say; None: where nothing else fits."""
    variant: str | None = None
    """The variant of the weight files, where there are several."""
    pinned: bool | None = None
    """Whether offloaded weights are in pinned memory; None: where the machine has enough."""
    performance_mode: PerformanceMode = "auto"
    """How components find their residency, of which no option speaks."""
    tile: int | None = None
    """Side in pixels of the autoencoder's tiles; None: it runs on the whole image."""
    slicing: bool = True
    """Whether layers are decoded one by one."""
    on_oom: OnOom = "degrade"
    adapters: tuple[loras.Chosen, ...] = ()
    lora_mode: loras.Mode = "auto"
    upscaling_model_path: str | None = None
    frame_interpolation_model_path: str | None = None
    foreign: Foreign | None = None
    """The pipeline that runs it in place of networks, where another library does."""

    @property
    def device(self) -> torch.device:
        return here()

    @property
    def precisions(self) -> Mapping[str, str]:
        """Component -> fp32, fp16 or bf16."""
        if self.foreign is not None:
            return self.foreign.precisions
        return {name: PRECISIONS[net.dtype] for name, net in self.nets.items()}

    @property
    def quantised(self) -> Mapping[str, str]:
        """Component -> the types of its weights that stay quantised, for those that have such."""
        kept = {name: quantisation.of(net.family.spec(net.config)) for name, net in self.nets.items()}
        return {name: each for name, each in kept.items() if each is not None}

    @property
    def frame_stride(self) -> int:
        """A video has a multiple of this many frames, and one."""
        return self.row.frame_multiple if self.foreign else self.autoencoder.config.scale_factor_temporal

    @property
    def denoiser(self) -> NetPlan[Denoiser]:
        """The first expert where there are two."""
        return self.expert("transformer")

    def expert(self, name: str) -> NetPlan[Denoiser]:
        """The denoiser of that name."""
        return cast(NetPlan[Denoiser], self.nets[name])

    @property
    def autoencoder(self) -> NetPlan[Autoencoder]:
        return cast(NetPlan[Autoencoder], self.nets["vae"])


@dataclass(frozen=True)
class Model:
    """A model in memory, which can answer any number of requests."""

    blueprint: Blueprint
    nets: Mapping[str, Net[Record]]
    tokenizers: Mapping[str, Tokenizer]
    adapters: Mapping[str, loras.Attached] = field(default_factory=dict[str, loras.Attached])
    replica: Group = ALONE
    """The ranks that answer a request together, of which the first admits it."""
    pipe: Untyped = None
    """The loaded pipeline of another library, where one runs the model."""

    @property
    def denoiser(self) -> Net[Denoiser]:
        """The first expert where there are two."""
        return self.expert("transformer")

    def expert(self, name: str) -> Net[Denoiser]:
        """The denoiser of that name."""
        return cast(Net[Denoiser], self.nets[name])

    @property
    def autoencoder(self) -> Net[Autoencoder]:
        return cast(Net[Autoencoder], self.nets["vae"])


def read(options: ModelOptions) -> Blueprint:
    """Read and check everything that `options` name except the weights. Raises UserError."""
    return from_components(components.chosen(options), options)


def from_components(checkpoint: Checkpoint, options: ModelOptions) -> Blueprint:
    """The blueprint of a model with these components. Raises UserError where they do not make a model."""
    parts = checkpoint.components
    if absent := [name for name in NEEDED if name not in parts]:
        raise UserError(
            "model_path",
            f"model_path: model_index.json has no {absent[0]}, which a {checkpoint.class_name} needs",
        )
    row, named = _row(checkpoint, options)
    records = _records(checkpoint, row, options)

    denoiser = records["transformer"]
    if not isinstance(denoiser, Denoiser):
        message = f"the component transformer is a {parts['transformer'].class_name}, which is not a denoiser"
        raise UserError("model_path", f"model_path: {message}")
    nets: dict[str, NetPlan[Record]] = {}
    for name, family in records.items():
        own = parts["text_encoder" if name == VISION else name]
        config = read_config(family, own)
        if (
            isinstance(family, Encoder)
            and family.preprocessor is not None
            and family.preprocessor[0] in parts
        ):
            config = preprocessed(family, config, parts[family.preprocessor[0]])
        if family is decoder_lm.FAMILY:
            states = denoiser.hidden_states.get(name, (-1,))
            config = _needed_layers(
                name, config, states if isinstance(states, tuple) else states[row.pipeline], checkpoint
            )
            if name == WRITER or (row.captions and name == "text_encoder"):
                config = replace(config, lm_head=True)
        settled = denoiser.config_overrides.get(name, {})
        config = replace(config, **{key: value for key, value in settled.items() if hasattr(config, key)})
        dtype = _dtype(name, family, options)
        nets[name] = NetPlan(name, family, own, config, dtype, *_plan(name, family, options))
    _check_fit(row, checkpoint, nets)
    _check_guider(checkpoint)
    nets = offload.settled(quantisation.settled(nets, options, _capability), options)
    scheduler = parts["scheduler"].entries("scheduler_config.json")
    solvers.check_types(scheduler)
    if ignored := solvers.unread(scheduler):
        log.warning(
            "scheduler: %s has no field %s, which is not read",
            scheduler.get("_class_name"),
            ", ".join(ignored),
        )
    tiling, tile = _tiles(options, nets["vae"].config)
    if compiled := options.enable_torch_compile:
        _check_compiler()
    tokenizers = {
        name: each for name, each in parts.items() if name.startswith(("tokenizer", "pe_tokenizer"))
    }
    return Blueprint(
        row,
        named,
        nets,
        tokenizers,
        scheduler,
        checkpoint.options,
        compiled,
        tiling,
        options.variant,
        options.pin_cpu_memory,
        options.performance_mode,
        tile,
        options.vae_slicing is not False,
        options.on_oom,
        loras.chosen(options),
        options.lora_merge_mode,
        options.upscaling_model_path,
        options.frame_interpolation_model_path,
    )


def _tiles(options: ModelOptions, vae: Config) -> tuple[bool | None, int | None]:
    """(whether the autoencoder runs on tiles, None where no option says so; the side of a tile)."""
    side, step = options.vae_tile_size, 4 * vae.scale_factor_spatial
    if side is None:
        return options.vae_tiling, TILE if options.vae_tiling else None
    if options.vae_tiling is False:
        raise UserError("vae_tile_size", "vae_tile_size: vae_tiling is false; leave one of them out")
    if side % step:
        nearest = max(step, round(side / step) * step)
        message = f"{side} is no multiple of {step}, four latents of this autoencoder; take {nearest}"
        raise UserError("vae_tile_size", f"vae_tile_size: {message}")
    return True, side


def load(blueprint: Blueprint, ranks: Ranks | None = None, merge_adapters: bool = False) -> Model:
    """Load the weights of every network to the device and dtype of the blueprint.

    Raises UserError for broken files.

    ranks: this process among several that all load the model; it loads its own part. merge_adapters: whether
    LoRA adapters are preferably merged, where the options leave it open.
    """
    _check_attention(blueprint)
    variant = blueprint.variant
    if variant is not None and not any(has(net.component.place, variant) for net in blueprint.nets.values()):
        raise UserError(
            "variant", f"variant: no component of {blueprint.row.name} has weights of the variant {variant!r}"
        )
    vae = blueprint.autoencoder
    try:
        vae.family.check_runnable(vae.config)
    except ValueError as error:
        raise UserError("model_path", f"{vae.component.where()}: {error}") from error
    tokenizers = {name: load_tokenizer(each.place) for name, each in blueprint.tokenizers.items()}
    nets, berth = dict[str, Net[Record]](), Berth()
    for name, net in blueprint.nets.items():
        log.debug("loading %s as %s", name, net.dtype)
        plan, sharding = (net.plan, None) if ranks is None else _sharded(net, ranks)
        replicas = ALONE if ranks is None or sharding is None else ranks.groups[sharding.where.same]
        with components.about(net.component.option):
            left, store = offload.store(
                net, plan, blueprint.device, variant, blueprint.pinned is not False, berth
            )
            weights = load_weights(
                net.component.place,
                net.family.spec(net.config),
                net.dtype,
                blueprint.device,
                net.keys,
                plan.along("tp", "shard"),
                replicas,
                () if sharding is None else sharding.blocks,
                variant,
                left,
            )
        nets[name] = Net(
            net.family,
            net.config,
            plan,
            weights,
            net.dtype,
            net.component.json.get("generation_config.json", {}) if name == WRITER else {},
            sharding=sharding,
            store=store,
        )
    read = [loras.read(each, nets) for each in blueprint.adapters]
    replica = ALONE if ranks is None else ranks.groups["replica"]
    model = Model(blueprint, nets, tokenizers, replica=replica)
    return with_adapters(model, read, blueprint.lora_mode, merge_adapters)


def with_adapters(
    model: Model, read: Sequence[loras.Read], mode: loras.Mode, prefer_merged: bool = False
) -> Model:
    """The model with these LoRA adapters beside its weights, in place of those that were there.

    Adapters that are in the weights already stay as they are. Raises UserError for one that does not fit.
    """
    merged = {name: each for name, each in model.adapters.items() if each.merged}
    nets, attached = loras.attach(model.nets, read, mode, prefer_merged)
    return replace(model, nets=nets, adapters=merged | attached)


def _sharded(net: NetPlan[Record], ranks: Ranks) -> tuple[Plan, Sharding]:
    """A network's plan on this rank, and how its weights lie on all of them."""
    placed, groups = network_placements(net, ranks.layout), ranks.groups
    if placed.whole is not None:
        log.info("%s stays whole on every rank: %s", net.name, placed.whole)
    where, axes = placed.mesh, dict[str, Group]()
    if net.family.role == "dit":
        axes = {axis: groups[axis] for axis in ("cfg", "ring", "ulysses")}
    elif net.family.role == "vae" and ranks.layout.vae:
        axes = {"height": groups["replica"]}
    axes |= {name: groups[axis] for name, axis in (("tp", where.split), ("shard", where.blocks)) if axis}
    return _with(net.plan, axes), Sharding(weights_mesh(ranks, where.axes), where, placed.blocks)


def _with(plan: Plan, axes: Mapping[str, Group]) -> Plan:
    return replace(plan, groups=tuple((axis, group) for axis, group in axes.items() if group.size > 1))


def _row(checkpoint: Checkpoint, options: ModelOptions) -> tuple[ReleasedModel, bool]:
    """(the released model whose defaults hold, whether it was found by name)."""
    entries = checkpoint.components["transformer"].entries()
    name = options.model_id or checkpoint.name
    row = registry.match(checkpoint.class_name, checkpoint.options, entries, name)
    if options.model_id is not None and (wanted := registry.named(options.model_id)) is not row:
        message = (
            f"model_id: {wanted.name} is a {registry.describe(wanted.kind)}, and "
            f"{options.model_path!r} is a {registry.describe(row.kind)}"
        )
        raise UserError("model_id", message)
    return row, row is registry.find(name)


def _needed_layers(name: str, config: Config, takes: tuple[int, ...], checkpoint: Checkpoint) -> Config:
    """A language model with only as many layers as its highest used hidden state needs.

    takes: the states; negative ones count from the end.
    """
    total = config.num_hidden_layers
    most = max(take if take >= 0 else total + 1 + take for take in takes)
    if not 0 <= most <= total:
        message = (
            f"{name} has {total} layers, and {checkpoint.class_name} reads its hidden states "
            f"{', '.join(map(str, takes))}"
        )
        raise UserError("model_path", f"model_path: {message}")
    return replace(config, layers=max(1, most))


def _check_guider(checkpoint: Checkpoint) -> None:
    """Raises UserError for a guider that is not plain classifier-free guidance."""
    part = checkpoint.components.get("guider")
    if part is None:
        return
    asked = {"class": part.class_name, **part.json.get("guider_config.json", {})}
    for name, known in {"class": "ClassifierFreeGuidance", **GUIDER}.items():
        if asked.get(name, known) != known:
            message = f"the guider's {name} is {asked[name]!r}; only {known!r} is implemented"
            raise UserError("model_path", f"model_path: {message}")


def _records(checkpoint: Checkpoint, row: ReleasedModel, options: ModelOptions) -> dict[str, Record]:
    """The record of each component with weights, after checking that every option about a
    component finds it.
    """
    records, parts = dict[str, Record](), checkpoint.components
    for name, class_name in ((name, part.class_name) for name, part in parts.items()):
        if name not in FILES and (name != WRITER or "pe_tokenizer" in parts):
            if name in UNREAD:
                continue
            if class_name not in RECORDS:
                message = (
                    f"component {name!r} has the class {class_name}, which is not supported; known "
                    f"are {', '.join(RECORDS)}"
                )
                raise UserError("model_path", f"model_path: {message}")
            records[name] = RECORDS[class_name]
            if class_name in TOWERS and row.images[0]:
                records[VISION] = TOWERS[class_name]
    for name in options.component_precisions:
        check_known("component_precisions", name, records)
    for name in options.component_attention_backends:
        check_known(
            "component_attention_backends",
            name,
            [name for name, family in records.items() if family.head_width is not None],
        )
    encoders = [name for name, family in records.items() if family.role == "text_encoder" and name != WRITER]
    if len(given := options.text_encoder_precisions) > len(encoders):
        raise UserError(
            "text_encoder_precisions",
            f"text_encoder_precisions: {len(given)} are given; text encoders: {len(encoders)}",
        )
    if options.image_encoder_precision is not None and "image_encoder" not in records:
        raise UserError("image_encoder_precision", "image_encoder_precision: the model has no image encoder")
    return records


def _dtype(name: str, family: Record, options: ModelOptions) -> torch.dtype | None:
    """A component's type as asked: the option for it, else that for its role."""
    encoders = options.text_encoder_precisions
    place = int(name.rpartition("_")[2]) - 1 if name.rpartition("_")[2].isdigit() else 0
    by_role = {
        "dit": options.dit_precision,
        "vae": options.vae_precision,
        "image_encoder": options.image_encoder_precision,
        "text_encoder": encoders[place] if place < len(encoders) else None,
    }
    asked = options.component_precisions.get(name) or by_role[family.role]
    return None if asked is None else DTYPES[asked]


def _plan(name: str, family: Record, options: ModelOptions) -> tuple[Plan, str]:
    """(a component's plan, the option that sets its attention). `attention_backend` is the denoiser's.
    Encoders, whose attention is masked, let torch choose unless they are named.
    """
    named, general = (
        options.component_attention_backends,
        options.attention_backend if family.role == "dit" else "sdpa",
    )
    backend = named.get(
        name, named.get(name.removesuffix("_2"), general)
    )  # a second component follows the first, as in SGLang
    return Plan(attention=backend), "component_attention_backends" if name in named else "attention_backend"


def _check_attention(blueprint: Blueprint) -> None:
    """Check that every attention backend runs here, with a small product on the device."""
    for name, net in blueprint.nets.items():
        if net.family.head_width is None:
            continue
        width, backend = net.family.head_width(net.config), net.plan.attention
        facts = width, net.family.biased, net.dtype, blueprint.device
        if not serves(backend, *facts):
            can = ", ".join(other for other in BACKENDS if serves(other, *facts))
            precision = PRECISIONS.get(net.dtype, net.dtype)
            where = f"the {name} in {precision} on this machine ({blueprint.device.type})"
            field = net.attention_option
            raise UserError(
                field, f"{field}: {backend!r} cannot run {where}; the backends that can are {can}"
            )


def _check_compiler() -> None:
    from tinydiff.sampling.compile import (
        has_compiler,
    )  # pulls in the compiler: only those who compile pay for it

    if not has_compiler():
        message = (
            "torch.compile needs a C++ compiler, and none is installed; install g++ or leave the option out"
        )
        raise UserError("enable_torch_compile", f"enable_torch_compile: {message}")


def _check_fit(row: ReleasedModel, checkpoint: Checkpoint, nets: Mapping[str, NetPlan[Record]]) -> None:
    """Check that the components that a request needs are there and agree with each other."""
    encoders = [name for name, plan in nets.items() if plan.family.role == "text_encoder"]
    denoiser = cast(NetPlan[Denoiser], nets["transformer"])
    needed = (
        *denoiser.family.extra_components(denoiser.config),
        *(name.replace("text_encoder", "tokenizer") for name in encoders),
    )
    if absent := [name for name in needed if name not in checkpoint.components]:
        raise UserError(
            "model_path",
            f"model_path: model_index.json has no {absent[0]}, which this {checkpoint.class_name} needs",
        )
    configs = {name: plan.config for name, plan in nets.items()}
    for name, value, why in denoiser.family.must_fit(denoiser.config, configs, row):
        if (own := getattr(denoiser.config, name)) != value:
            given = dict.fromkeys(plan.component.option for plan in nets.values())
            option = next((each for each in given if each != "model_path"), "model_path")
            message = (
                f"the components do not fit each other: the transformer's {name} is {own}, and {why} {value}"
            )
            raise UserError(option, f"{option}: {message}")
    if "transformer_2" in nets:  # both experts run in one loop
        first, second = nets["transformer"], nets["transformer_2"]
        if first.config != second.config:
            name = next(
                each.name
                for each in fields(first.config)
                if getattr(first.config, each.name) != getattr(second.config, each.name)
            )
            values = f"{getattr(first.config, name)!r} and {getattr(second.config, name)!r}"
            message = f"{name} is {values} in transformer and transformer_2, which must have one config"
            raise UserError("model_path", f"model_path: {message}")
        if first.plan != second.plan:
            field = "component_attention_backends"
            raise UserError(
                field, f"{field}: transformer and transformer_2 run in one loop and need the same"
            )
