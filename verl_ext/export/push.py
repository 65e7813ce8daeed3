"""Push an exported folder to the Hugging Face hub: the model and its card, and nothing that was not asked for."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from verl_ext.report.read import one_line as printable
from verl_ext.runs.checkpoints import ExportError, one_line

ALLOWED = re.compile(
    r"(lora_adapter/)?(README\.md|(model|adapter_model)(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|(config|generation_config|adapter_config|preprocessor_config|processor_config|video_preprocessor_config)\.json"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json"
    r"|vocab\.txt|merges\.txt|(tokenizer|sentencepiece\.bpe|spiece)\.model|(additional_chat_templates/)?\w+\.jinja"
    r"|(configuration|modeling|modular|tokenization|processing|image_processing)_\w+\.py)"
)
"""What a model's folder on the hub has. Optimizer states, logs, settings and other files do not match."""

SECRET = re.compile(
    r"\b(hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{36,}|AKIA[0-9A-Z]{16}|AIza[\w-]{35}"
    r"|xox[abprs]-[A-Za-z0-9-]{10,})|-----BEGIN [A-Z ]*PRIVATE KEY-----|://[^/\s:@]+:[^/\s:@]+@"
)
"""Tokens of well-known services, private keys, and addresses with a password."""

CARD_LINES = 30
"""Lines of the card that a dry run shows."""


class Plan(NamedTuple):
    """What would go up."""

    files: list[str]
    left_out: list[str]


def is_hub_name(repo: str) -> bool:
    """Tell whether ``repo`` can name a repository on the hub."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        return False
    return True


def plan(folder: Path) -> Plan:
    """Choose the files of an exported folder that are pushed; others are left out.

    Raises:
        ExportError: there is no card or no weights, or a text holds what looks like a secret.
    """
    # Links are left out: they may lead anywhere.
    found = [f for f in sorted(folder.rglob("*")) if f.is_symlink() or not f.is_dir()]
    names = {f.relative_to(folder).as_posix(): f for f in found}
    here = folder.resolve()
    own = {n for n, f in names.items() if not f.is_symlink() and f.is_file() and f.resolve() == here / n}
    files = [name for name in names if name in own and ALLOWED.fullmatch(name)]
    if "README.md" not in files or not any(name.endswith(".safetensors") for name in files):
        raise ExportError(f"{folder} is no exported model: it needs README.md and safetensors")
    for name in files:
        if not name.endswith(".safetensors") and SECRET.search(names[name].read_text(errors="replace")):
            raise ExportError(f"{names[name]} holds what looks like a token, a key or a password; nothing was pushed")
    return Plan(files, [name for name in names if name not in files])


def size(count: int) -> str:
    """Write a number of bytes, as the hub does: 1 MB has a million."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"


def describe(folder: Path, repo: str, private: bool, chosen: Plan) -> str:
    """Say what would go where: files with sizes, who sees them, the card's first lines."""
    sizes = {name: os.path.getsize(folder / name) for name in chosen.files}
    lines = [f"to https://huggingface.co/{repo}, {'private' if private else 'PUBLIC: everybody can read it'}:"]
    lines += [f"  {size(count):>9}  {name}" for name, count in sizes.items()]
    left_out = ", ".join(map(printable, chosen.left_out))
    lines += [f"  {size(sum(sizes.values())):>9}  in {len(sizes)} files"]
    lines += [f"not pushed: {left_out}"] if chosen.left_out else []
    card = (folder / "README.md").read_text(errors="replace").splitlines()
    more = len(card) - CARD_LINES
    lines += ["the card:", *(f"  | {line}" for line in card[:CARD_LINES])]
    return "\n".join(lines + ([f"  | ... {more} more lines"] if more > 0 else []))


def push(folder: Path, repo: str, private: bool, chosen: Plan) -> str:
    """Push the chosen files as one commit, making the repository if there is none; return its address.

    Raises:
        ExportError: the hub refuses, or the repository is public and ``private`` was asked for, or the other way round.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        # Of a repository that is there already, this changes nothing.
        found = api.create_repo(repo, private=private, exist_ok=True, repo_type="model").repo_id
        is_private = api.repo_info(found, repo_type="model").private
        if bool(is_private) != private:
            there, wanted = ("private", "--public") if is_private else ("public", "without --public")
            raise ExportError(f"{found} exists and is {there}, but the push is {wanted}; nothing was pushed")
        commit = api.upload_folder(
            repo_id=found,
            folder_path=folder,
            allow_patterns=chosen.files,
            commit_message="Upload the model",
            repo_type="model",
        )
    except ExportError:
        raise
    except Exception as e:  # of the hub, of HTTP and of the network
        hint = "; log in with `hf auth login`, or set HF_TOKEN" if "token" in str(e).lower() else ""
        raise ExportError(f"the hub did not take {repo}: {type(e).__name__}: {one_line(e)}{hint}") from e
    return str(commit.commit_url)
