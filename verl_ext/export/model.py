"""Write a checkpoint's model as a Hugging Face folder, and check that it is the trained model.

verl's merger drops a LoRA adapter from the weights and rounds them to bfloat16, so checkpoints of the FSDP engine are
merged here, by torch, peft and transformers.
"""

import gc
import itertools
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from verl_ext.export.checks import (
    LogProbs,
    compare_files,
    compare_log_probs,
    compare_with_base,
    log_probs,
    log_probs_of_checkpoint,
    tokens_of_prompts,
)
from verl_ext.runs.checkpoints import (
    MEGATRON_MANIFEST,
    Checkpoint,
    ExportError,
    Renamed,
    SafeTensors,
    Shards,
    floating_dtypes,
    name_of,
    read_json,
    same_bits,
    widest,
)

MODEL = "actor_rollout_ref.model."
LORA_NOTE = "lora_train_meta.json"
"""verl's file beside a checkpoint with the adapter's rank and alpha."""
FILE_SIZE = 5 * 10**9
"""Bytes of weights per file, at most; safetensors needs as much memory to write one."""
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
LORA_B = re.compile(r"base_model\.model\.(.+)\.lora_(?:B\.[^.]+\.weight|embedding_B\.[^.]+)")


@dataclass
class Source:
    """A checkpoint's model in float32, with its adapter not merged yet.

    Args:
        model: a transformers model, or a peft model around one.
        dtypes: the types of the weights in the checkpoint.
        frozen: the weights under an adapter by name, as far as the checkpoint has them.
        scratch: holds the tensors if they do not fit into memory.
    """

    model: Any
    dtypes: set[torch.dtype]
    frozen: Mapping[str, torch.Tensor] = field(default_factory=dict)
    scratch: "Scratch | None" = None

    @property
    def dtype(self) -> torch.dtype:
        """A type that holds all of the checkpoint's values."""
        return widest(self.dtypes)


def export_model(
    checkpoint: Checkpoint, out: Path, settings: Mapping[str, Any], dtype: torch.dtype | None, trust_remote_code: bool
) -> list[str]:
    """Write a whole checkpoint's model and tokenizer into the empty folder ``out`` and check them.

    Args:
        settings: the run's settings by full name.
        dtype: the type of the exported weights; None: as in the checkpoint.
        trust_remote_code: run the model's own code.

    Returns:
        Sentences for the card: the type, the adapter, and the checks with their figures.

    Raises:
        ExportError: the checkpoint cannot be exported, or the export differs from the trained model.
        ValueError, OSError, RuntimeError: a file cannot be read or written, or a library refuses its content.
    """
    with ExitStack() as stack:
        scratch = out / "scratch"
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        if not checkpoint.megatron:
            source = read_fsdp(checkpoint, settings, dtype, scratch, trust_remote_code)
        elif uses_adapter(checkpoint) or any(checkpoint.huggingface.glob("*.safetensors")):
            source = read_megatron(checkpoint, settings, trust_remote_code)
        else:
            return merge_megatron(checkpoint, out, settings, dtype, trust_remote_code)
        dtype = dtype or source.dtype
        told, expected = write(source, checkpoint, out, settings, dtype, trust_remote_code)
        if expected is None:
            return told
        # Two models at a time may not fit into memory.
        del source
        gc.collect()
        found = log_probs(load(out, trust_remote_code), tokens_of_prompts(out, trust_remote_code))
        return told + compare_log_probs(expected, found, dtype)


def read_fsdp(
    checkpoint: Checkpoint,
    settings: Mapping[str, Any],
    dtype: torch.dtype | None,
    scratch: Path,
    trust_remote_code: bool,
) -> Source:
    """Read the model from the shards of verl's FSDP engine; see :func:`export_model`."""
    from accelerate import init_empty_weights
    from peft import get_peft_model

    shards = Shards(checkpoint.folder)
    dtypes = floating_dtypes({n: shards.meta(n).dtype for n in shards})
    adapter = adapter_config(checkpoint, settings) if any("lora_" in name for name in shards) else None
    if adapter and all("lora_" in name for name in shards):
        # actor.checkpoint.save_lora_only
        model = get_peft_model(load_base(settings, trust_remote_code), adapter)
        expected = {n: t for n, t in model.state_dict().items() if "lora_" in n}
        check_names(expected, shards)
        model.load_state_dict({n: shards[n].float() for n in shards}, strict=False)
        return Source(model, dtypes)

    config, auto_class = model_class(checkpoint.huggingface, trust_remote_code)
    with init_empty_weights():
        model = auto_class.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
        base = model
        if adapter:
            model = get_peft_model(model, adapter)
    if any(hasattr(e, "base_layer") for e in (base.get_input_embeddings(), base.get_output_embeddings())):
        # An adapter on one of the two tables makes them different.
        base.config.tie_word_embeddings = False
    base.tie_weights()
    tied: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tied.setdefault(id(tensor), []).append(name)
    check_names(model.state_dict(), shards, [names for names in tied.values() if len(names) > 1])
    store = Scratch.where_needed(scratch, sum(shards.meta(n).numel() for n in shards), dtype or widest(dtypes))
    state = {}
    for names in tied.values():
        first, *others = [n for n in names if n in shards]
        tensor = shards[first]
        if odd := [n for n in others if not same_bits(shards[n], tensor)]:
            raise ExportError(f"config.json ties {odd[0]} to {first}, but they differ in the checkpoint")
        state |= dict.fromkeys(names, hold(tensor, torch.float32, store))
    model.load_state_dict(state, assign=True)
    base.tie_weights()
    frozen = {}
    if adapter:
        plain = {
            n.removeprefix("base_model.model.").replace(".base_layer.", "."): n for n in shards if "lora_" not in n
        }
        frozen = Renamed(shards, plain)
    return Source(model, dtypes, frozen, store)


def read_megatron(checkpoint: Checkpoint, settings: Mapping[str, Any], trust_remote_code: bool) -> Source:
    """Read the model and its adapter from the Hugging Face files of the Megatron engine; see :func:`export_model`."""
    if not uses_adapter(checkpoint):
        saved = SafeTensors(checkpoint.huggingface)
        return Source(load(checkpoint.huggingface, trust_remote_code), floating_dtypes(saved.dtypes()))
    from peft import PeftModel

    folder = checkpoint.huggingface / "adapter"
    if not (folder / "adapter_config.json").is_file():
        raise ExportError(
            f"{checkpoint.folder} holds an adapter as Megatron shards only, which cannot be merged; "
            "train with actor_rollout_ref.actor.megatron.vanilla_mbridge=False, which also saves it for peft"
        )
    model = PeftModel.from_pretrained(load_base(settings, trust_remote_code), str(folder))
    return Source(model, floating_dtypes(SafeTensors(folder, "adapter_model").dtypes()))


def uses_adapter(checkpoint: Checkpoint) -> bool:
    """Tell whether a Megatron checkpoint has an adapter."""
    backend = read_json(checkpoint.folder / MEGATRON_MANIFEST).get("backend")
    return isinstance(backend, dict) and backend.get("peft") is True


def merge_megatron(
    checkpoint: Checkpoint, out: Path, settings: Mapping[str, Any], dtype: torch.dtype | None, trust_remote_code: bool
) -> list[str]:
    """Let verl's merger write the model in Megatron's own shards; see :func:`export_model`."""
    trained = settings.get("actor_rollout_ref.actor.megatron.dtype", "bfloat16")
    if dtype not in (None, torch.bfloat16) or (dtype is None and trained != "bfloat16"):
        raise ExportError(
            f"verl's merger writes Megatron's shards in bfloat16 only (trained in {trained}); give --dtype bfloat16"
        )
    command = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", "megatron"]
    command += ["--local_dir", str(checkpoint.folder), "--target_dir", str(out)]
    if trust_remote_code:
        command.append("--trust-remote-code")
    merged = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if merged.returncode or not any(out.glob("*.safetensors")):
        raise ExportError(f"verl's model merger failed ({' '.join(command)}):\n{merged.stdout[-3000:]}")
    return [
        "bfloat16, as verl's merger writes them.",
        *compare_with_base(out, settings[MODEL + "path"], base_folder(settings), {}, [torch.bfloat16], set()),
        "Log-probabilities were not compared: Megatron's shards cannot be loaded by transformers.",
    ]


def write(
    source: Source,
    checkpoint: Checkpoint,
    out: Path,
    settings: Mapping[str, Any],
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> tuple[list[str], LogProbs | None]:
    """Merge, convert and save the model of a checkpoint, and compare the tensors in the files.

    Returns:
        Sentences for the card, and the checkpoint's log-probabilities, or None with a sentence that says why.
    """
    not_these = shutil.ignore_patterns(*WEIGHT_FILES, "config.json", "adapter")
    shutil.copytree(checkpoint.huggingface, out, dirs_exist_ok=True, ignore=not_these)
    prompts = tokens_of_prompts(out, trust_remote_code)
    model, store = source.model, source.scratch
    if store:
        expected = None
        not_compared = f"the model needs more than the {store.available / 2**30:.1f} GiB of memory that are free"
    else:
        expected, not_compared = log_probs_of_checkpoint(model, prompts)

    told = [f"{name_of(dtype)}, as in the checkpoint."]
    if source.dtypes != {dtype}:
        why = "as requested" if dtype != source.dtype else "which holds all values"
        told = [f"{name_of(dtype)}, {why}; the checkpoint has {' and '.join(sorted(map(name_of, source.dtypes)))}."]
    trained: set[str] = set()
    if hasattr(model, "peft_config"):
        trained = trained_by_adapter(model)
        told.append(save_adapter(model, settings[MODEL + "path"], out / "lora_adapter"))
        model = model.merge_and_unload()
    for tensor in model.state_dict(keep_vars=True).values():
        tensor.data = hold(tensor.data, dtype, store)
    model.save_pretrained(out, max_shard_size=FILE_SIZE)
    # transformers wrote one from the model's configuration; the model's own has more settings.
    if (checkpoint.huggingface / "generation_config.json").is_file():
        shutil.copy(checkpoint.huggingface / "generation_config.json", out)

    told.append(compare_files(out, model, dtype))
    path = settings[MODEL + "path"]
    told += compare_with_base(out, path, base_folder(settings), source.frozen, [source.dtype, dtype], trained)
    if expected is None:
        told.append(f"Log-probabilities were not compared: {not_compared}.")
    return told, expected


# -- What is in a checkpoint


def adapter_config(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Any:
    """Make peft's configuration of the adapter that verl's FSDP engine trained.

    Raises:
        ExportError: the adapter that training started from is not on this machine, or the settings contradict verl's
            file beside the checkpoint.
    """
    from peft import LoraConfig, PeftConfig

    start = settings.get(MODEL + "lora_adapter_path")
    if start:
        if not isinstance(start, str) or not Path(start).is_dir():
            raise ExportError(f"{MODEL}lora_adapter_path={start} is no folder here; it has the adapter's scale")
        config = PeftConfig.from_pretrained(start)
    else:
        for name, kinds in (("lora_rank", (int,)), ("lora_alpha", (int, float))):
            value = settings.get(MODEL + name)
            if type(value) not in kinds or not 0 < value < math.inf:
                raise ExportError(f"{MODEL}{name}={value}, but the checkpoint holds an adapter: it must be positive")
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=settings[MODEL + "lora_rank"],
            lora_alpha=settings[MODEL + "lora_alpha"],
            bias="none",
            **{n: settings.get(MODEL + n) for n in ("target_modules", "target_parameters", "exclude_modules")},
        )
    if (checkpoint.folder / LORA_NOTE).exists():
        noted = read_json(checkpoint.folder / LORA_NOTE)
        if (config.r, int(config.lora_alpha)) != (noted.get("r"), noted.get("lora_alpha")):
            raise ExportError(
                f"config.yaml has rank {config.r} and alpha {config.lora_alpha}, but {LORA_NOTE} beside the checkpoint "
                f"has rank {noted.get('r')} and alpha {noted.get('lora_alpha')}: they are from different runs"
            )
    return config


def model_class(folder: Path, trust_remote_code: bool) -> tuple[Any, Any]:
    """Read the configuration in ``folder`` and look up verl's class for such models.

    Raises:
        ExportError: the configuration names no class.
    """
    from transformers import AutoConfig
    from verl.utils.model import get_hf_auto_model_class

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if not config.architectures:
        raise ExportError(f"{folder / 'config.json'} names no model class under architectures")
    return config, get_hf_auto_model_class(config)


def load(folder: Path, trust_remote_code: bool) -> Any:
    """Load the model in a Hugging Face folder, in float32.

    Raises:
        ExportError: tensors are missing or unknown, or do not fit into memory.
    """
    needed, available = 4 * sum(SafeTensors(folder).sizes().values()), available_memory()
    if needed > available:
        raise ExportError(f"{folder} needs {needed / 2**30:.1f} GiB of memory; {available / 2**30:.1f} GiB are free")
    config, auto_class = model_class(folder, trust_remote_code)
    model, info = auto_class.from_pretrained(
        folder, config=config, dtype=torch.float32, trust_remote_code=trust_remote_code, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info[kind])):
            raise ExportError(f"transformers reports {kind.replace('_', ' ')} in {folder}: {', '.join(names[:3])}")
    return model


def base_folder(settings: Mapping[str, Any]) -> Path | None:
    """Find the folder of the model that training started from; None if it is not on this machine."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    path = settings[MODEL + "path"]
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def load_base(settings: Mapping[str, Any], trust_remote_code: bool) -> Any:
    """Load the model that training started from, in float32.

    Raises:
        ExportError: it is not on this machine.
    """
    folder = base_folder(settings)
    if folder is None:
        path = settings[MODEL + "path"]
        raise ExportError(f"the checkpoint holds only an adapter, and {MODEL}path={path} is not on this machine")
    return load(folder, trust_remote_code)


def check_names(expected: Mapping[str, torch.Tensor], found: Shards, tied: list[list[str]] | None = None) -> None:
    """Raise ExportError unless the checkpoint has the model's tensors (of tied ones, any) and no others."""
    elsewhere = {n for names in tied or [] if any(n in found for n in names) for n in names}
    for what, names in (
        ("lacks", expected.keys() - found.keys() - elsewhere),
        ("has unknown", found.keys() - expected.keys()),
        ("has in another shape", {n for n in expected if n in found and expected[n].shape != found.meta(n).shape}),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ExportError(
                f"compared with the model of config.json and config.yaml, the checkpoint {what} tensors: "
                f"{', '.join(sorted(names)[:3])}{more}"
            )


# -- Memory


class Scratch:
    """A folder of files that hold tensors."""

    def __init__(self, folder: Path, available: int):
        self.folder, self.available = folder, available
        self._numbers = itertools.count()

    @classmethod
    def where_needed(cls, folder: Path, values: int, dtype: torch.dtype) -> "Scratch | None":
        """Make a scratch folder, unless a model of ``values`` numbers fits into memory in float32.

        Raises:
            ExportError: it does not fit on the disk either.
        """
        needed, available = 4 * values + min(4 * values, FILE_SIZE), available_memory()
        if needed <= available:
            return None
        needed = (4 + 2 * dtype.itemsize) * values
        free = shutil.disk_usage(folder.parent).free
        if needed > free:
            raise ExportError(
                f"the model does not fit into the {available / 2**30:.1f} GiB of free memory, nor on the disk of "
                f"{folder.parent}: {needed / 2**30:.1f} GiB are needed there, {free / 2**30:.1f} GiB are free"
            )
        folder.mkdir()
        return cls(folder, available)

    def copy(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Copy a tensor into a new file."""
        file = str(self.folder / str(next(self._numbers)))
        return torch.from_file(file, shared=True, size=tensor.numel(), dtype=dtype).view(tensor.shape).copy_(tensor)


def hold(tensor: torch.Tensor, dtype: torch.dtype, scratch: Scratch | None) -> torch.Tensor:
    """Copy a tensor, a floating-point one in ``dtype``, into ``scratch`` if there is one, else into memory."""
    dtype = dtype if tensor.is_floating_point() else tensor.dtype
    if scratch and tensor.numel():
        return scratch.copy(tensor, dtype)
    return tensor.to(dtype, copy=True)


def available_memory() -> int:
    """Return the bytes of memory that this process may still use on the machine and in its control group."""
    available, group = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        cached = int(re.search(r"^file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)[1])
    except (OSError, ValueError, TypeError):  # another version of control groups, or no limit
        return available
    return min(available, limit - used + cached)


# -- The adapter


def trained_by_adapter(model: Any) -> set[str]:
    """List the weights that an adapter changes, by their names in the base model.

    Raises:
        ExportError: it changes none.
    """
    matrices = {match[1]: tensor for n, tensor in model.named_parameters() if (match := LORA_B.fullmatch(n))}
    trained = {f"{name}.weight" for name, tensor in matrices.items() if tensor.any()}
    if not trained:
        zero = f"the adapter's {len(matrices)} B matrices are zero, as before training"
        raise ExportError(f"{zero}: the export would be the base model")
    return trained


def save_adapter(model: Any, base: str, folder: Path) -> str:
    """Write the adapter on its own, for peft and rollout engines; return the sentence for the card."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = model.peft_config["default"]
    config.base_model_name_or_path = base
    config.save_pretrained(folder)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file({n: t.contiguous() for n, t in state.items()}, folder / "adapter_model.safetensors")
    targets = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules or []
    kinds = sorted({name.rpartition(".")[2] for name in targets} | set(config.target_parameters or []))
    return (
        f"The adapter (rank {config.r}, alpha {config.lora_alpha}, on {', '.join(kinds)}) is merged into the weights; "
        f"`{folder.name}/` has it on its own."
    )
