"""A run with rewards that hang, raise or are no numbers, and a disk that fills up while a checkpoint is written."""

import pytest

REWARD = """
import time
from pathlib import Path

def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    total = sum(map(ord, solution_str))
    if total % 23 > 4:
        return float(total % 2)
    # Another fault in each step.
    logs = Path(__file__).parent.rglob("metrics.jsonl")
    step = sum(log.read_text().count('"training/failed_rewards"') for log in logs)
    if step == 0:
        time.sleep(600)
    if step == 1:
        raise ArithmeticError("not my day")
    return {2: None, 3: float("nan"), 4: "right"}[step]
"""

FULL = """
import errno
from pathlib import Path

import torch

save = torch.save

def until_it_is_emptied(content, file, *arguments, **options):
    if "global_step_3" in str(file) and Path(__file__).with_name("full").exists():
        Path(file).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device", str(file))
    return save(content, file, *arguments, **options)

torch.save = until_it_is_emptied
"""


@pytest.mark.slow
def test_it_goes_on_where_it_can_and_says_what_is_wrong_where_not(main_ppo, tmp_path):
    for name, content in {"reward.py": REWARD, "full.py": FULL, "full": ""}.items():
        (tmp_path / name).write_text(content)
    command = [
        "algorithm=disco",
        f"disco.module={tmp_path}/full.py",
        f"reward.custom_reward_function.path={tmp_path}/reward.py",
        "++verl_ext.reward_timeout=2",
        "++verl_ext.max_failed_rewards=0.6",
        "trainer.total_training_steps=5",
        "trainer.save_freq=1",
        "trainer.max_actor_ckpt_to_keep=1",
    ]
    first = main_ppo(*command)
    assert first.returncode != 0
    assert "No space left on device" in first.output
    assert "the checkpoint of step 3 in" in first.output and "(free on this node: " in first.output
    assert f"the run in {first.folder} ended early" in first.output
    assert "the same command continues from global_step_2" in first.output
    assert [step["step"] for step in first.metrics()] == [1, 2]

    (tmp_path / "full").unlink()
    second = main_ppo(*command)
    assert second.returncode == 0, second.output[-5000:]
    steps = second.metrics()
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5]
    # Their responses are left out, and the others of their questions are trained on.
    assert sum(step["training/failed_rewards"] for step in steps) > 4
    assert all(step["disco/questions"] == 3 and step["actor/grad_norm"] > 0 for step in steps)
    output = first.output + second.output
    told = (
        "no answer in 2 s (verl_ext.reward_timeout)",
        "not my day",
        "returned None",
        "returned nan",
        "'right' (str)",
    )
    assert [text for text in told if text not in output] == []
    assert [f.name for f in second.folder.glob("global_step_*")] == ["global_step_5"]
