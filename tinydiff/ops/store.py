"""Weights that are not on the device all the time, and how they get there.

A network's flat dict has a meta tensor in place of each such weight, and a `Store` beside it has the weight
itself. Where a whole network is offloaded, all of it comes to the device when one of its weights is read, and
leaves when another offloaded network comes. Where its blocks are streamed, a block's weights come when the
block computes, and those of the blocks behind it are prefetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tinydiff.ops.network import RESIDENT, Fetch
from tinydiff.parallel.plan import STREAMS, Row

Read = Callable[[Iterable[str]], dict[str, Tensor]]
"""Names -> these weights in the host's memory: mappings of their file, or new tensors."""
Names = tuple[str, ...]

PAGE = 4096
"""Bytes of a page of memory."""
ALIGNMENT = 256
"""Bytes to which tensors in a bucket are aligned, as the allocator of CUDA aligns its own."""


class Source(Protocol):
    """Where absent weights come from. Every `start` is followed by its `take`, in the same order."""

    def start(self, names: Names) -> Any:
        """Begin to bring these weights to the device."""
        ...

    def take(self, pending: Any) -> dict[str, Tensor]:
        """The weights of a start by their names. They may be overwritten after `ahead` more starts."""
        ...

    def release(self) -> None:
        """Give back its memory on the device, while nothing is on its way. The next start takes it again."""
        ...


@dataclass(frozen=True, eq=False)
class Store:
    """The absent weights of one network.

    blocks: prefix -> the names that its block reads, in the order of the blocks. ahead: how many blocks are
    prefetched.
    """

    source: Source
    device: torch.device
    blocks: Mapping[str, Names] = field(default_factory=dict[str, Names])
    ahead: int = 1

    @property
    def fetch(self) -> Fetch:
        """How a walk fetches the blocks."""
        return Fetch(_start, _take, self.ahead)

    def read(self, *names: str) -> dict[str, Tensor]:
        """These weights on the device."""
        return self.source.take(self.source.start(names))


class Pending(NamedTuple):
    """A block on its way. here: the entries that are on the device already."""

    absent: Absent
    started: Any


@dataclass(frozen=True, eq=False)
class Absent(Mapping[str, Tensor]):
    """Entries below `prefix` of a flat dict of which some are absent; reading one brings it alone.

    here: the entries without the prefix, meta tensors for those that are absent.
    """

    store: Store
    here: Mapping[str, Tensor]
    prefix: str = ""

    def __getitem__(self, name: str) -> Tensor:
        value = self.here[name]
        if not value.is_meta:
            return value
        full = f"{self.prefix}{name}"
        return self.store.read(full)[full]

    def __iter__(self) -> Iterator[str]:
        return iter(self.here)

    def __len__(self) -> int:
        return len(self.here)

    def start(self) -> Pending:
        """Begin to bring what the block of this prefix reads."""
        return Pending(self, self.store.source.start(self.store.blocks[self.prefix.removesuffix(".")]))

    def take(self, started: Any) -> dict[str, Tensor]:
        """The block's entries, all on the device. What it does not read is left out."""
        came = self.store.source.take(started)
        here = {name: x for name, x in self.here.items() if not x.is_meta}
        return here | {name.removeprefix(self.prefix): x for name, x in came.items()}


def _start(prefix: str, local: Mapping[str, Tensor]) -> Any:
    return local.start() if isinstance(local, Absent) else local


def _take(prefix: str, pending: Any) -> Mapping[str, Tensor]:
    return pending.absent.take(pending.started) if isinstance(pending, Pending) else pending


def fetch(*stores: Store | None) -> Fetch:
    """How one walk fetches the blocks of networks with these stores, which take turns in a loop."""
    found = [store.fetch for store in stores if store is not None]
    return min(found, key=lambda each: each.ahead, default=RESIDENT)


def entries(flat: Mapping[str, Tensor], store: Store | None) -> Mapping[str, Tensor]:
    """The weights of a network, each of them to be read."""
    return flat if store is None else Absent(store, flat)


def in_order(flat: Mapping[str, Tensor], store: Store | None) -> Mapping[str, Tensor]:
    """The same, for a network that runs without a walk and reads its blocks one after another."""
    if store is None or not store.blocks:
        return entries(flat, store)
    return InOrder(store, flat)


def tree(divided: Mapping[str, Mapping[str, Tensor]], store: Store | None) -> dict[str, Mapping[str, Tensor]]:
    """Weights divided by blocks, for a walk that fetches by `fetch`."""
    if store is None:
        return dict(divided)
    return {
        prefix: Absent(store, below, f"{prefix}." if prefix else "")
        if any(x.is_meta for x in below.values())
        else below
        for prefix, below in divided.items()
    }


def present(below: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The entries as they are, without bringing any."""
    return below.here if isinstance(below, Absent) else below


@dataclass(eq=False)
class InOrder(Mapping[str, Tensor]):
    """All entries of a network whose blocks are streamed while it runs without a walk, as encoders do.

    A block comes when one of its weights is read, and leaves when one of another block is.
    """

    store: Store
    here: Mapping[str, Tensor]
    block: str | None = None
    now: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    pending: list[tuple[str, Any]] = field(default_factory=list[tuple[str, Any]])

    def __post_init__(self) -> None:
        self.order = list(self.store.blocks)
        self.block_of = {name: block for block, names in self.store.blocks.items() for name in names}

    def __getitem__(self, name: str) -> Tensor:
        value = self.here[name]
        if not value.is_meta:
            return value
        if name not in self.block_of:
            return self.store.read(name)[name]
        if self.block_of[name] != self.block:
            self._enter(self.block_of[name])
        return self.now[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.here)

    def __len__(self) -> int:
        return len(self.here)

    def _enter(self, block: str) -> None:
        source, at = self.store.source, self.order.index(block)
        self.now = {}
        while self.pending and self.pending[0][0] != block:  # prefetched, and skipped after all
            source.take(self.pending.pop(0)[1])
        if not self.pending:
            self.pending.append((block, source.start(self.store.blocks[block])))
        self.now, self.block = source.take(self.pending.pop(0)[1]), block
        for following in self.order[at + 1 + len(self.pending) : at + 1 + self.store.ahead]:
            self.pending.append((following, source.start(self.store.blocks[following])))


# --- sources


_readers = ThreadPoolExecutor(1, "weights")
"""Reads ahead: one thread, so that what is asked for first comes first."""


@dataclass(frozen=True, eq=False)
class Mapped:
    """Weights that stay in their files. They are read into the page cache ahead, and mapped or cast."""

    read: Read
    device: torch.device

    def start(self, names: Names) -> Future[dict[str, Tensor]]:
        return _readers.submit(self._read, names)

    def take(self, pending: Future[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: x.to(self.device) for name, x in pending.result().items()}

    def release(self) -> None:
        pass  # it holds none

    def _read(self, names: Names) -> dict[str, Tensor]:
        weights = self.read(names)
        for x in weights.values():  # a byte of each page, which reads the page
            x.view(-1).view(torch.uint8)[::PAGE].sum()
        return weights


class InBucket(NamedTuple):
    """A weight in a bucket. at: its first byte."""

    name: str
    at: int
    like: Tensor

    def of(self, bucket: Tensor) -> Tensor:
        """Its tensor, a view of the bucket's bytes."""
        flat = bucket[self.at : self.at + self.like.nbytes].view(self.like.dtype)
        return flat.view(self.like.shape)


class Bucket(NamedTuple):
    """Weights one behind the other in a flat tensor of bytes."""

    data: Tensor
    parts: tuple[InBucket, ...]


def bucket(weights: Mapping[str, Tensor], pinned: bool) -> Bucket:
    """A copy of these weights in one bucket in the host's memory."""
    parts: list[InBucket] = []
    end = 0
    for name, x in weights.items():
        parts.append(InBucket(name, end, x.to("meta")))
        end += -(-x.nbytes // ALIGNMENT) * ALIGNMENT
    data = torch.empty(end, dtype=torch.uint8, device="cpu", pin_memory=pinned)
    for part in parts:
        part.of(data).copy_(weights[part.name])
    return Bucket(data, tuple(parts))


@dataclass(frozen=True)
class Copy:
    """A bucket on the GPU, whole when `done` has happened."""

    bucket: Bucket
    done: torch.cuda.Event


@dataclass(eq=False)
class Buckets:
    """Weights in pinned buckets in the host's memory, copied to a ring of static buffers on the GPU.

    The copies run on a stream of their own. A buffer is overwritten when what computed with it is done.
    """

    buckets: Mapping[Names, Bucket]
    """The names that a block reads -> its bucket."""
    rest: Bucket
    """What is read alone."""
    device: torch.device
    ahead: int

    def __post_init__(self) -> None:
        self.stream = torch.cuda.Stream(self.device)
        self.ring = self._buffers()
        every = (*self.buckets.values(), self.rest)
        self.homes = {part.name: (part, each.data) for each in every for part in each.parts}
        self.starts = 0

    def start(self, names: Names) -> Names | Copy:
        if names not in self.buckets:
            return names
        self.ring = self.ring or self._buffers()
        held, slot = self.buckets[names], self.ring[self.starts % len(self.ring)][:]
        self.starts += 1
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            slot[: held.data.nbytes].copy_(held.data, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self.stream)
        return Copy(held._replace(data=slot), done)

    def take(self, pending: Names | Copy) -> dict[str, Tensor]:
        if not isinstance(pending, Copy):
            return {name: self._alone(name) for name in pending}
        torch.cuda.current_stream(self.device).wait_event(pending.done)
        return {part.name: part.of(pending.bucket.data) for part in pending.bucket.parts}

    def release(self) -> None:
        self.ring = []

    def _buffers(self) -> list[Tensor]:
        largest = max((each.data.nbytes for each in self.buckets.values()), default=0)
        return [torch.empty(largest, dtype=torch.uint8, device=self.device) for _ in range(self.ahead + 1)]

    def _alone(self, name: str) -> Tensor:
        part, data = self.homes[name]
        return part.of(data).to(self.device)


@dataclass(eq=False)
class Berth:
    """The place on the device that offloaded networks share: one is there at a time."""

    holder: Whole | None = None

    def enter(self, comer: Whole) -> None:
        """Another that is there leaves before this one comes."""
        if self.holder is not comer:
            if self.holder is not None:
                self.holder.there.clear()
            self.holder = comer
            comer.there.update(comer.bring())

    def leave(self) -> None:
        """What is there leaves."""
        if self.holder is not None:
            self.holder.there.clear()
        self.holder = None


@dataclass(eq=False)
class Whole:
    """An offloaded network: all of its weights are on the device, or none."""

    bring: Callable[[], Mapping[str, Tensor]]
    berth: Berth
    there: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def start(self, names: Names) -> Names:
        return names

    def take(self, pending: Names) -> dict[str, Tensor]:
        self.berth.enter(self)
        return {name: self.there[name] for name in pending}

    def release(self) -> None:
        self.berth.leave()


# --- which names


def loop_names(rows: Iterable[Row], prefixes: Sequence[str]) -> dict[str, Names]:
    """Prefix of each block -> the weights below it that it reads at every step.

    Weights that only `hoist` reads are left out: it reads each of them alone.
    """
    names_of: dict[str, list[str]] = {prefix: [] for prefix in prefixes}
    for row in rows:
        cuts = (i for i, letter in enumerate(row.name) if letter == ".")
        block_of = next((row.name[:cut] for cut in cuts if row.name[:cut] in names_of), None)
        if block_of is not None and (row.input is None or row.input in STREAMS):
            names_of[block_of].append(row.name)
    return {prefix: tuple(names) for prefix, names in names_of.items()}


def numbered(rows: Iterable[Row]) -> dict[str, Names]:
    """The blocks of a network without a list of them: what has the same name up to its first number."""
    names_of: dict[str, list[str]] = {}
    for row in rows:
        parts = row.name.split(".")
        cut = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if cut is not None:
            names_of.setdefault(".".join(parts[: cut + 1]), []).append(row.name)
    return {prefix: tuple(names) for prefix, names in names_of.items()}
