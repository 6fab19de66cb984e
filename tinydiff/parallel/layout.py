"""How many ranks each axis of the mesh has, and which ranks form a group. No torch here."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import prod

from tinydiff.config import ParallelOptions
from tinydiff.records import UserError

AXES = ("dp", "cfg", "ring", "ulysses", "tp")
"""The axes of the mesh, outermost first. Ranks with neighbouring numbers, usually the best connected, share
the axis that communicates most.
"""

AXIS_OPTIONS = {
    "dp": "data_parallel_size", "cfg": "cfg_parallel_size", "ring": "ring_degree",
    "ulysses": "ulysses_degree", "tp": "tp_size",
}  # fmt: skip
"""Axis -> the option that sets it."""
PORT = 30005
"""The port where several machines meet, by default."""


@dataclass(frozen=True)
class Layout:
    """Ranks along each axis, and what else is sharded.

    dp: replicas, each with requests of its own. cfg: branches of guidance. ring, ulysses: the sequence. tp:
    the weights. fsdp: the weights of each block are sharded over the ranks of a replica that would otherwise
    hold the same ones, and gathered when the block is entered. encoders: text encoders are sharded over the
    ranks of a replica too. vae: so is the height of the autoencoder's images.
    """

    dp: int = 1
    cfg: int = 1
    ring: int = 1
    ulysses: int = 1
    tp: int = 1
    fsdp: bool = False
    encoders: bool = False
    vae: bool = False

    @property
    def size(self) -> int:
        """Ranks in all."""
        return prod(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def sequence(self) -> int:
        """Ranks that share a sequence."""
        return self.ring * self.ulysses


COMBINED_AXES: dict[str, tuple[str, ...]] = {
    "replica": ("cfg", "ring", "ulysses", "tp"),
    "shard": ("cfg", "ring", "ulysses"),
    "peers": ("dp", "cfg", "ring", "ulysses"),
    "world": AXES,
}
"""Groups over several axes: the ranks of a replica; the ranks of a replica that would hold the same weights;
all ranks that would hold the same weights; all ranks.
"""


def rank_groups(layout: Layout, name: str) -> list[list[int]]:
    """All groups of an axis, or of a name in `COMBINED_AXES`: lists of ranks in the order of the mesh.

    Every rank is in one of them.
    """
    along = COMBINED_AXES.get(name, (name,))
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank, place in enumerate(product(*map(range, layout.sizes))):
        fixed = tuple(at for axis, at in zip(AXES, place, strict=True) if axis not in along)
        groups.setdefault(fixed, []).append(rank)
    return list(groups.values())


def count(asked: ParallelOptions, running: int | None = None) -> int:
    """The number of ranks: `num_gpus`, else the product of the given degrees; 1 where none is given.

    running: how many ranks torchrun has started, one of which is this process; None without torchrun. Raises
    UserError where the options contradict each other or the running ranks.
    """
    fixed, machines = degrees(asked), asked.nnodes or 1
    if running is None:
        ranks = asked.num_gpus or prod(fixed.values())
        _check_machines(asked, ranks, machines)
    else:
        ranks = running
        for name in ("nnodes", "node_rank", "dist_init_addr", "master_port"):
            if (value := getattr(asked, name)) is not None:
                raise UserError(
                    name, f"{name}: {value} cannot be given under torchrun, which sets it; leave it out"
                )
        if asked.num_gpus not in (None, running):
            raise UserError(
                "num_gpus",
                f"num_gpus: {asked.num_gpus} is not the number of ranks that torchrun started, {running}",
            )
    if ranks % prod(fixed.values()):
        raise _unequal(ranks, fixed)
    for name, value in (("use_fsdp_inference", True), ("vae_sp", True), ("encoder_parallel", "fold")):
        if ranks == 1 and getattr(asked, name) == value:
            raise UserError(name, f"{name}: {str(value).lower()} needs several ranks; give num_gpus too")
    return ranks


def _unequal(ranks: int, fixed: Mapping[str, int]) -> UserError:
    return UserError(
        "num_gpus",
        f"num_gpus: {ranks} does not match {_named(fixed)}, which makes {prod(fixed.values())} ranks",
    )


def _named(fixed: Mapping[str, int]) -> str:
    return " x ".join(f"{AXIS_OPTIONS[axis]} {n}" for axis, n in fixed.items())


def _check_machines(asked: ParallelOptions, ranks: int, machines: int) -> None:
    if asked.node_rank is not None and asked.node_rank >= machines:
        allowed = f"give 0 to {machines - 1}" if machines > 1 else "leave it out, or give nnodes"
        raise UserError(
            "node_rank",
            f"node_rank: {asked.node_rank} is out of range for {machines} machines, from 0; {allowed}",
        )
    if machines > 1 and asked.dist_init_addr is None:
        raise UserError(
            "dist_init_addr",
            f"dist_init_addr: {machines} machines (nnodes) need the first one's address, host:port",
        )
    if machines == 1 and asked.dist_init_addr is not None:
        raise UserError(
            "dist_init_addr",
            f"dist_init_addr: {asked.dist_init_addr!r} is only used with several machines; give nnodes too",
        )
    if ranks % machines:
        raise UserError(
            "num_gpus",
            f"num_gpus: {ranks} ranks do not divide equally among {machines} machines (nnodes)",
        )
    address(asked)


def address(asked: ParallelOptions) -> tuple[str, int]:
    """(host, port) where the processes meet; port 0 is any free port.

    Raises UserError for what is not host:port.
    """
    if asked.dist_init_addr is None:
        return "localhost", asked.master_port or 0
    host, colon, port = asked.dist_init_addr.rpartition(":")
    if not colon:
        return asked.dist_init_addr, asked.master_port or PORT
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(
            "dist_init_addr",
            f"dist_init_addr: {asked.dist_init_addr!r} is not host:port, such as node0:{PORT}",
        )
    if asked.master_port not in (None, int(port)):
        raise UserError(
            "master_port",
            f"master_port: {asked.master_port} is not the port of dist_init_addr, {port}; give one of them",
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


def degrees(asked: ParallelOptions) -> dict[str, int]:
    """Axis -> ranks along it, for the axes that the options set.

    Raises UserError where two options of one axis disagree.
    """
    cfg = asked.cfg_parallel_size
    if asked.enable_cfg_parallel is not None:
        if cfg is not None and asked.enable_cfg_parallel != (cfg > 1):
            switch = str(asked.enable_cfg_parallel).lower()
            raise UserError(
                "cfg_parallel_size",
                f"cfg_parallel_size: {cfg} contradicts enable_cfg_parallel {switch}; give one of them",
            )
        cfg = 2 if asked.enable_cfg_parallel else 1
    ring, ulysses, both = asked.ring_degree, asked.ulysses_degree, asked.sp_degree
    if both is not None:
        product = (ring or 1) * (ulysses or 1)
        if both % product or (ring and ulysses and both != product):
            asked_for = " times ".join(
                f"{AXIS_OPTIONS[axis]} {n}" for axis, n in (("ulysses", ulysses), ("ring", ring)) if n
            )
            raise UserError(
                "sp_degree",
                f"sp_degree: {both} is not ulysses_degree times ring_degree; {asked_for} is given",
            )
        ulysses, ring = ulysses or both // product, ring or (both // product if ulysses else 1)
    fixed = {
        "dp": asked.data_parallel_size,
        "cfg": cfg,
        "ring": ring,
        "ulysses": ulysses,
        "tp": asked.tp_size,
    }
    return {axis: n for axis, n in fixed.items() if n is not None}


def choose(
    asked: ParallelOptions,
    ranks: int,
    heads: int,
    guided: bool,
    tokens: int | None = None,
    outputs: int | None = None,
) -> tuple[Layout, str]:
    """(how `ranks` ranks share the work, the reason in one line).

    Given degrees stay. The remaining ranks go to axes that are not given: first to the two branches of
    guidance, which communicate once per step; then to ulysses, as many as divide the heads; then to tp.
    Replicas and the ring are never chosen. heads: of the denoiser. guided: whether a negative prompt takes
    part. tokens: of the smallest image; outputs: how many; None where not known. Raises UserError, see
    `check`.
    """
    fixed = degrees(asked)
    sizes, why = dict.fromkeys(AXES, 1) | fixed, dict.fromkeys(fixed, "asked")
    left, over = divmod(ranks, prod(fixed.values()))
    check(replace(Layout(), **sizes), heads, guided, tokens, outputs)
    if over or (left > 1 and len(fixed) == len(AXES)):
        raise _unequal(ranks, fixed)
    if left > 1 and "cfg" not in fixed and guided and left % 2 == 0:
        sizes["cfg"], why["cfg"], left = 2, "guidance runs", left // 2
    if left > 1:
        shares = list(_shares(left, sizes, fixed, heads, tokens))
        if not shares:
            beside = f" beside {_named(fixed)}" if fixed else ""
            more = "fewer, or data_parallel_size or ring_degree too"
            raise UserError(
                "num_gpus",
                f"num_gpus: {ranks} ranks do not fit the denoiser's {heads} heads{beside}; give {more}",
            )
        fit, ulysses, tp = max(shares)
        sizes |= {"ulysses": sizes["ulysses"] * ulysses, "tp": sizes["tp"] * tp}
        why = {"ulysses": f"{'divides' if fit else 'pads'} {heads} heads", "tp": "the rest"} | why
    replica, fsdp = ranks // sizes["dp"], bool(asked.use_fsdp_inference)
    if asked.vae_sp and replica == 1:
        message = "true needs several ranks in a replica; give fewer replicas (data_parallel_size)"
        raise UserError("vae_sp", f"vae_sp: {message}")
    vae = replica > 1 and asked.vae_sp is not False
    layout = replace(Layout(), **sizes, fsdp=fsdp, encoders=asked.encoder_parallel == "fold", vae=vae)
    check(layout, heads, guided, tokens, outputs)
    if layout.encoders and replica == layout.tp:
        raise UserError(
            "encoder_parallel",
            "encoder_parallel: 'fold' needs more ranks in a replica than those of tp_size; leave it out",
        )
    if asked.encoder_parallel == "replicate" and layout.tp > 1:
        message = (
            f"'replicate' is not possible with tp_size {layout.tp}, which shards encoders too; "
            "give auto or fold"
        )
        raise UserError("encoder_parallel", f"encoder_parallel: {message}")
    return layout, f"{ranks} ranks: " + ", ".join(
        f"{axis} {sizes[axis]} ({why[axis]})" for axis in AXES if sizes[axis] > 1
    )


def _shares(
    left: int, sizes: Mapping[str, int], fixed: Collection[str], heads: int, tokens: int | None
) -> Iterator[tuple[bool, int, int]]:
    """The ways to divide `left` ranks between ulysses and tp, where they are not given: (whether ulysses
    divides the heads, ulysses, tp).
    """
    for ulysses in range(1, left + 1):
        tp = left // ulysses
        free = (ulysses == 1 or "ulysses" not in fixed) and (tp == 1 or "tp" not in fixed)
        along, across = sizes["ulysses"] * ulysses, sizes["tp"] * tp
        enough = along * across <= heads and (tokens is None or along * sizes["ring"] <= tokens)
        if left % ulysses == 0 and free and enough and heads % across == 0:
            yield heads // sizes["tp"] % ulysses == 0, ulysses, tp


def check(
    layout: Layout, heads: int, guided: bool, tokens: int | None = None, outputs: int | None = None
) -> None:
    """Refuse a layout that is not possible for this model and request.

    Arguments as of `choose`. Raises UserError naming the option.
    """
    if heads % layout.tp:
        fit = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise UserError(
            "tp_size",
            f"tp_size: {layout.tp} does not divide the denoiser's {heads} heads; choose one of {fit}",
        )
    if layout.ulysses * layout.tp > heads:
        beside = f" times tp_size {layout.tp}" if layout.tp > 1 else ""
        message = (
            f"{layout.ulysses}{beside} is more than the denoiser's {heads} heads; ring_degree has no "
            "such limit"
        )
        raise UserError("ulysses_degree", f"ulysses_degree: {message}")
    if layout.cfg == 2 and not guided:
        message = "2 is only for requests with guidance; set a guidance scale above 1 or leave it out"
        raise UserError("cfg_parallel_size", f"cfg_parallel_size: {message}")
    if tokens is not None and layout.sequence > tokens:
        raise UserError(
            "sp_degree",
            f"sp_degree: {layout.sequence} ranks cannot share an image of {tokens} tokens; give "
            f"at most {tokens}",
        )
    if layout.fsdp and len(rank_groups(layout, "shard")[0]) == 1:
        message = (
            "no two ranks hold the same weights, so there is nothing to shard; give cfg_parallel_size, "
            "ulysses_degree or ring_degree too"
        )
        raise UserError("use_fsdp_inference", f"use_fsdp_inference: {message}")
    if outputs is not None and layout.dp > outputs:
        raise UserError(
            "data_parallel_size",
            f"data_parallel_size: {layout.dp} replicas for {outputs} outputs; give at most {outputs}",
        )
