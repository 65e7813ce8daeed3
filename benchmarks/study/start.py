"""Measure the model that all runs of a task start from: 64 responses to each held-out question, stored as verl does."""

import json
import sys
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toy import Toy, sample  # noqa: E402

SAMPLES = 64


def measure(folder: Path, name: str) -> None:
    """Write ``folder/start/NAME.jsonl`` for the questions in ``folder/NAME.parquet``."""
    toy = Toy.load(folder / "assets")
    questions = pd.read_parquet(folder / f"{name}.parquet").to_dict("records")
    texts = [q["prompt"][0]["content"] for q in questions]
    # Each is there several times.
    questions = [q for i, q in enumerate(questions) if texts.index(texts[i]) == i]
    torch.set_num_threads(1)
    rewards = sample(toy, questions, SAMPLES, seed=0).reward.view(-1, SAMPLES).tolist()
    lines = []
    for number, (question, own) in enumerate(zip(questions, rewards, strict=True)):
        tokens = toy.tokenizer.apply_chat_template(
            question["prompt"].tolist(), add_generation_prompt=True, tokenize=False
        )
        text = toy.tokenizer.decode(toy.tokenizer.encode(tokens), skip_special_tokens=True)
        lines += [
            {"input": text, "data_source": question["data_source"], "acc": reward, "uid": f"{number}_{i}_0"}
            for i, reward in enumerate(own)
        ]
    file = folder / "start" / f"{name}.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
