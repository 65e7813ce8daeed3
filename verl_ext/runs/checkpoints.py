"""The checkpoints in a run's folder: which of them are whole, and the tensors in their files."""

import json
import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor, Shard

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The types of weights by their names in ``--dtype``."""
STEP_FOLDER = re.compile(r"global_step_(0|[1-9][0-9]{0,17})")
SHARD = re.compile(r"model_world_size_([1-9][0-9]*)_rank_([0-9]+)\.pt")
FSDP_CONFIG = "fsdp_config.json"
MEGATRON_MANIFEST = "ckpt_contents.json"
"""The file that verl's Megatron engine writes last."""


class ExportError(Exception):
    """A checkpoint cannot be exported; the message says why."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of the policy.

    Args:
        folder: ``global_step_N/actor``.
        megatron: verl's Megatron engine wrote it; otherwise its FSDP engine did.
        fault: why the checkpoint is not whole; empty if it is.
    """

    step: int
    folder: Path
    megatron: bool
    fault: str = ""

    @property
    def huggingface(self) -> Path:
        """The folder with the model's configuration and tokenizer."""
        return self.folder / "model/huggingface" if self.megatron else self.folder / "huggingface"


def find_checkpoints(run: Path, megatron: bool) -> list[Checkpoint]:
    """Find the checkpoints in ``run`` by verl's folder names, whole or not, in the order of their steps."""
    fault = megatron_fault if megatron else fsdp_fault
    return sorted(
        (
            Checkpoint(int(match[1]), folder / "actor", megatron, fault(folder / "actor"))
            for folder in run.iterdir()
            if (match := STEP_FOLDER.fullmatch(folder.name)) and (folder / "actor").is_dir()
        ),
        key=lambda c: c.step,
    )


def fsdp_fault(actor: Path) -> str:
    """Say why a checkpoint of verl's FSDP engine is not whole; empty if it is."""
    try:
        for file in shard_files(actor):
            if not file.is_file():
                return f"{file.name} is missing"
            # torch.save writes a zip archive, whose directory comes last.
            if not zipfile.is_zipfile(file):
                return f"{file.name} is cut off"
        read_json(actor / "huggingface/config.json")
    except ValueError as e:
        return str(e)
    return ""


def megatron_fault(actor: Path) -> str:
    """Say why a checkpoint of verl's Megatron engine is not whole; empty if it is."""
    kinds = ("huggingface/*.safetensors", "huggingface/adapter/adapter_config.json", "dist_ckpt/.metadata")
    try:
        read_json(actor / MEGATRON_MANIFEST)
        if not any(file for kind in kinds for file in (actor / "model").glob(kind)):
            return "model/ holds no weights"
        read_json(actor / "model/huggingface/config.json")
    except ValueError as e:
        return str(e)
    return ""


def shard_files(actor: Path) -> list[Path]:
    """List the files that a checkpoint's shards belong in, by rank, whether they exist or not.

    Raises:
        ValueError: the number of ranks is unknown.
    """
    sizes = {int(match[1]) for file in actor.iterdir() if (match := SHARD.fullmatch(file.name))}
    if (actor / FSDP_CONFIG).exists():
        # A restart on another number of ranks leaves the earlier shards in the folder.
        size = read_json(actor / FSDP_CONFIG).get("world_size")
        if type(size) is not int or size < 1:
            raise ValueError(f"world_size={size!r} in {FSDP_CONFIG} is not a number of ranks")
    elif len(sizes) == 1:
        (size,) = sizes
    else:
        found = f"shards of {' and '.join(map(str, sorted(sizes)))} ranks" if sizes else "no shards"
        raise ValueError(f"{found} (model_world_size_N_rank_R.pt) and no {FSDP_CONFIG}")
    return [actor / f"model_world_size_{size}_rank_{rank}.pt" for rank in range(size)]


def read_json(file: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        ValueError: the file cannot be read, or holds no object.
    """
    try:
        value = json.loads(file.read_text())
    except OSError as e:
        raise ValueError(f"{file.name} is missing or cannot be read ({e.strerror})") from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file.name} is not JSON ({e})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file.name} holds no JSON object")
    return value


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Tell whether two tensors are the same, where a NaN equals itself."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (a, b)))


class LazyTensors(Mapping[str, torch.Tensor]):
    """Tensors by name, each read when asked for and not before; ``places`` says where each one is."""

    def __init__(self, places: Mapping[str, Any]):
        self._places = places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        # Mapping's own method would read the tensor.
        return name in self._places


class Shards(LazyTensors):
    """Full tensors by name, joined from all ranks' shards when asked for.

    Raises:
        ValueError: a file cannot be read, or the ranks hold different tensors, or an unknown layout.
    """

    def __init__(self, actor: Path):
        self._ranks = [self._load(file) for file in shard_files(actor)]
        for rank, shard in enumerate(self._ranks):
            if odd := shard.keys() ^ self._ranks[0].keys():
                names = ", ".join(sorted(odd)[:3])
                raise ValueError(f"ranks 0 and {rank} of {actor} hold different tensors: {names}")
        super().__init__(self._ranks[0])

    @staticmethod
    def _load(file: Path) -> dict[str, torch.Tensor]:
        try:
            # weights_only: unpickling other objects could run code.
            shard = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as e:  # zip, pickle and torch each raise their own
            raise ValueError(f"{file} cannot be read: {one_line(e)}") from None
        if not isinstance(shard, dict) or not all(isinstance(t, torch.Tensor) for t in shard.values()):
            raise ValueError(f"{file} holds something other than named tensors")
        return shard

    def meta(self, name: str) -> torch.Tensor:
        """Return a tensor's shape and type without its values."""
        tensor = self._ranks[0][name]
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    @torch.no_grad()
    def __getitem__(self, name: str) -> torch.Tensor:
        parts = [shard[name] for shard in self._ranks]
        first = parts[0]
        if not isinstance(first, DTensor):
            if not all(same_bits(first, part) for part in parts[1:]):
                raise ValueError(f"{name} is not sharded, but differs between ranks")
            return first
        ranks = first.device_mesh.mesh
        if int(ranks.max()) >= len(parts):
            raise ValueError(f"{name} is sharded over {ranks.numel()} ranks, of which {len(parts)} have a file")
        full = _join(parts, ranks, list(first.placements), name)
        if full.shape != first.shape:
            raise ValueError(f"the shards of {name} have shape {tuple(full.shape)} together, not {tuple(first.shape)}")
        return full


def _join(parts: list[DTensor], ranks: torch.Tensor, placements: list[Any], name: str) -> torch.Tensor:
    """Join the parts of a tensor; ``ranks`` is an array with a dimension per placement."""
    if not placements:
        return parts[int(ranks)].to_local()
    placement, *inner = placements
    if placement.is_replicate():
        return _join(parts, ranks[0], inner, name)
    if type(placement) is not Shard:
        raise ValueError(f"{name} is laid out as {placement}; only Shard and Replicate can be joined")
    return torch.cat([_join(parts, below, inner, name) for below in ranks], dim=placement.dim)


class Renamed(LazyTensors):
    """The tensors of another mapping under new names; ``names`` maps the new names to the old ones."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], names: dict[str, str]):
        super().__init__(names)
        self._tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[self._places[name]]


class SafeTensors(LazyTensors):
    """The weights in a Hugging Face folder by name, each read when asked for; empty without safetensors.

    Raises:
        ValueError: a file cannot be read.
    """

    def __init__(self, folder: Path, stem: str = "model"):
        files, index = [folder / f"{stem}.safetensors"], folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            file_of = read_json(index).get("weight_map")
            if not isinstance(file_of, dict):
                raise ValueError(f"{index} has no weight_map")
            files = [folder / name for name in sorted({str(name) for name in file_of.values()})]
        places: dict[str, Any] = {}
        for file in files:
            if file.is_file() or index.is_file():
                try:
                    tensors = safe_open(file, "pt")
                except (SafetensorError, OSError) as e:
                    raise ValueError(f"{file} cannot be read: {e}") from None
                places |= dict.fromkeys(tensors.keys(), tensors)
        super().__init__(places)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._places[name].get_tensor(name)

    def sizes(self) -> dict[str, int]:
        """Count the values of each tensor."""
        return {n: math.prod(f.get_slice(n).get_shape()) for n, f in self._places.items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Read the type of each tensor."""
        slices = {n: f.get_slice(n) for n, f in self._places.items()}
        return {n: (s[:0] if s.get_shape() else self[n]).dtype for n, s in slices.items()}


def floating_dtypes(dtypes: Mapping[str, torch.dtype]) -> set[torch.dtype]:
    """Select the floating-point types among those of these tensors.

    Raises:
        ExportError: weights cannot be exported in one of them.
    """
    floating = {n: d for n, d in dtypes.items() if d.is_floating_point}
    for name, dtype in floating.items():
        if dtype not in DTYPES.values():
            raise ExportError(f"{name} is {name_of(dtype)}; only {', '.join(DTYPES)} can be exported")
    return set(floating.values())


def widest(dtypes: set[torch.dtype]) -> torch.dtype:
    """Choose a type that holds the values of all ``dtypes``."""
    return next(iter(dtypes)) if len(dtypes) == 1 else torch.float32


def name_of(dtype: torch.dtype) -> str:
    """Name a type: ``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def one_line(error: Exception) -> str:
    """Shorten an error's text to one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]
