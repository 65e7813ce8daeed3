"""Checks that an exported folder holds the trained model: its files, its weights, its log-probabilities."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from verl_ext.runs.checkpoints import ExportError, SafeTensors, name_of, one_line

TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
"""The largest allowed difference of a token's log-probability, by the type of the weights."""
PROMPTS = (
    "12+34=",
    "Compute 17 * 23 and explain each step.",
    "Let $f(x) = x^2 - 4x + 3$. For which real $x$ is $f(x) = 0$?",
    "The quick brown fox jumps over the lazy dog. 0123456789",
)
"""Texts whose log-probabilities are compared."""


@dataclass
class LogProbs:
    """A checkpoint's log-probabilities of the prompts' tokens.

    Args:
        values: one per token.
        effect: the largest change without the adapter; None if there is no adapter.
    """

    values: torch.Tensor
    effect: float | None = None


def tokens_of_prompts(folder: Path, trust_remote_code: bool) -> list[torch.Tensor]:
    """Tokenize the prompts into batches of one row, by the tokenizer in ``folder``.

    Raises:
        ExportError: the tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return [torch.tensor([ids]) for p in PROMPTS if len(ids := tokenizer(p).input_ids) > 1]
    except Exception as e:  # tokenizers raise many kinds
        raise ExportError(f"the checkpoint's tokenizer cannot be loaded: {type(e).__name__}: {one_line(e)}") from e


@torch.no_grad()
def log_probs(model: Any, prompts: list[torch.Tensor]) -> torch.Tensor:
    """Compute the log-probability of each token of the prompts, except each first one."""
    model.eval()
    found = []
    for ids in prompts:
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        found.append(-torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    return torch.cat(found)


def log_probs_of_checkpoint(model: Any, prompts: list[torch.Tensor]) -> tuple[LogProbs | None, str]:
    """Compute the checkpoint's log-probabilities; None, with a reason, if the model does not run on a CPU.

    Raises:
        ExportError: they are not finite.
    """
    try:
        expected = log_probs(model, prompts)
    except Exception as e:  # a model may need an accelerator's kernels
        return None, f"the model does not run on a CPU ({type(e).__name__}: {one_line(e)})"
    if not expected.isfinite().all():
        raise ExportError("the checkpoint's log-probabilities are not finite: training has diverged")
    if not hasattr(model, "peft_config"):
        return LogProbs(expected), ""
    with model.disable_adapter():
        return LogProbs(expected, float((log_probs(model, prompts) - expected).abs().max())), ""


def compare_log_probs(expected: LogProbs, found: torch.Tensor, dtype: torch.dtype) -> list[str]:
    """Say how far the exported model's log-probabilities are from the checkpoint's.

    Raises:
        ExportError: further than ``TOLERANCE``.
    """
    worst, effect = float((found - expected.values).abs().max()), expected.effect
    if not worst <= TOLERANCE[dtype]:
        raise ExportError(
            f"the exported model's log-probabilities differ by {worst:.3g} from the checkpoint's; "
            f"at most {TOLERANCE[dtype]} was expected in {name_of(dtype)}"
        )
    told = f"Log-probabilities of {len(found)} tokens match the checkpoint's within {worst:.2g}, run by transformers"
    if effect is None:
        return [told + "."]
    told = [told + f"; without the adapter they change by up to {effect:.2g}."]
    if worst > effect:
        told.append(f"Warning: rounding to {name_of(dtype)} changes them by more than training did.")
    return told


def compare_files(out: Path, model: Any, dtype: torch.dtype) -> str:
    """Read the files back and compare their tensors with the model's.

    Raises:
        ExportError: they differ, or hold values that are not finite.
    """
    from transformers.core_model_loading import revert_weight_conversion

    expected = revert_weight_conversion(model, model.state_dict())
    written = SafeTensors(out)
    held = {expected[n].data_ptr() for n in written if n in expected}
    lost = [n for n, t in expected.items() if n not in written and t.data_ptr() not in held]
    if lost or not written:
        raise ExportError(f"{len(lost)} tensors were not written: {', '.join(lost[:3])}")
    for name, tensor in written.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ExportError(f"{name} has values that are not finite in {name_of(dtype)}")
        if name not in expected or tensor.dtype != expected[name].dtype or not torch.equal(tensor, expected[name]):
            raise ExportError(f"{name} in the files differs from the checkpoint")
    return f"All {len(written)} tensors in the files equal the checkpoint's in {name_of(dtype)}, bit by bit."


def compare_with_base(
    out: Path,
    path: str,
    folder: Path | None,
    frozen: Mapping[str, torch.Tensor],
    rounding: list[torch.dtype],
    trained: set[str],
) -> list[str]:
    """Say which tensors differ from the model that training started from.

    Args:
        path: the model's name in the settings.
        folder: the model's folder; None if it is not on this machine.
        frozen: the model's weights in the checkpoint, used if the folder has none.
        rounding: the types that weights were converted to, in order.
        trained: weights that an adapter changes; empty if all weights were trained.

    Raises:
        ExportError: no trained tensor differs.
    """
    where, base, unread = f"`{path}`", {}, "is not on this machine"
    if folder:
        unread = "holds no safetensors of these names"
        try:
            base = SafeTensors(folder)
        except ValueError as e:
            unread = f"is damaged ({e})"
    if not base and frozen:
        base, where = frozen, "the frozen weights in the checkpoint"
    exported = SafeTensors(out)
    common = exported.keys() & base.keys()
    if not common:
        return [f"Not compared with the base model `{path}`: it {unread}."]
    changed, largest = set(), 0.0
    for name in common:
        ours, theirs = exported[name], base[name]
        for dtype in rounding if theirs.is_floating_point() else ():
            theirs = theirs.to(dtype)
        if ours.shape != theirs.shape:
            changed.add(name)
        elif not torch.equal(ours, theirs):
            changed.add(name)
            largest = max(largest, float((ours.float() - theirs.float()).abs().max()))
    # An adapter on bare parameters changes tensors that have other names in the files.
    named = trained if trained <= exported.keys() else set()
    if not changed or (named & common and not named & changed):
        raise ExportError(f"no trained tensor differs from {where}: the export would be the base model")
    told = f"{len(changed)} of {len(common)} tensors differ from {where}, by {largest:.3g} at most"
    if not named:
        return [told + "."]
    told = [told + f"; the adapter changes {len(named)}, of which {len(named & changed)} differ."]
    if strange := sorted(changed - named):
        told.append(f"Warning: {', '.join(strange[:3])} differ, untrained: {where} is not where training started.")
    return told
