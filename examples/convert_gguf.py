"""Convert a model in a GGUF file to a Hugging Face folder, to train it as ``model=OUT``. Needs ``pip install gguf``.

    .venv/bin/python examples/convert_gguf.py SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2

transformers reads the file and undoes its quantization; what that lost stays lost. Weights become float32.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(file: Path, out: Path) -> None:
    """Write model and tokenizer of ``file`` to the folder ``out``.

    Raises:
        SystemExit: there is no chat template in the file, without which verl cannot write a prompt.
    """
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if not tokenizer.chat_template:
        raise SystemExit(f"{file} has no chat template; take the file of an instruct model")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    convert(args.file, args.out)
    print(f"written to {args.out}: give model={args.out}")
