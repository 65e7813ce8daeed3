"""DisCO through the whole pipeline: resuming, uneven batches, failed rewards, and refusals before Ray starts."""

import json
import shutil

import pytest

from verl_ext.report import __main__ as report
from verl_ext.runs.folder import read_metrics


def test_a_resumed_run_continues_as_an_uninterrupted_one(main_ppo, tmp_path):
    common = [
        "algorithm=disco",
        "disco.constraint=augmented_lagrangian",
        "disco.rho=50",
        "disco.delta=0",
        "trainer.save_freq=1",
        "trainer.test_freq=2",
        "trainer.max_actor_ckpt_to_keep=3",
        "trainer.resume_mode=auto",
        "trainer.total_training_steps=4",
    ]
    whole = main_ppo(*common, folder=tmp_path / "whole")
    assert whole.returncode == 0, whole.output[-5000:]
    # All are whole, the first one made room, and each holds its step's row.
    assert sorted(p.parent.name for p in (tmp_path / "whole").glob("global_step_*/actor")) == [
        "global_step_2",
        "global_step_3",
        "global_step_4",
    ]
    # As if it had been lost while step 2 was evaluated and its row written, and the tracker's next step with it.
    shutil.copytree(tmp_path / "whole", tmp_path / "parts", ignore=shutil.ignore_patterns("global_step_[34]"))
    (tmp_path / "parts/latest_checkpointed_iteration.txt").write_text("3")
    log = tmp_path / "parts/metrics.jsonl"
    cut = log.read_text().splitlines(keepends=True)
    log.write_text(cut[0] + cut[1][:50])
    saved = json.loads((tmp_path / "parts/global_step_2/actor/disco_controller.json").read_text())
    assert saved["state"]["multiplier"] > 0
    rest = main_ppo(*common, folder=tmp_path / "parts")
    assert rest.returncode == 0, rest.output[-5000:]
    assert "whose checkpoint is missing; resuming from the newest whole one, step 2" in rest.output
    assert "evaluating step 2: its evaluation was not logged" in rest.output
    assert (tmp_path / "parts/metrics.jsonl.1").read_text() == cut[0] + cut[1][:50]

    expected, found = whole.metrics(), rest.metrics()
    assert [s["step"] for s in found] == [s["step"] for s in expected] == [1, 2, 3, 4]
    assert expected[2]["disco/constraint_multiplier"] > 0
    # The method's weights: 1/n+ of a positive at most, and no negative beyond all of its question's.
    assert all(-1 <= s["critic/advantages/min"] < 0 < s["critic/advantages/max"] <= 1 for s in expected)
    # But for what comes after the checkpoint, the row that it held is whole; the evaluation has been made up for.
    missing = expected[1].keys() - found[1].keys()
    assert missing <= {f"timing_s/{name}" for name in ("save_checkpoint", "update_weights", "testing")}
    assert [any(name.startswith("val-core/") for name in step) for step in found] == [False, True, False, True]
    for a, b in zip(expected, found, strict=True):
        for name in ("disco/constraint_multiplier", "disco/kl", "disco/loss", "actor/grad_norm", "critic/score/mean"):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-7), (name, a["step"])


@pytest.mark.slow
def test_an_evaluation_alone_is_reported(main_ppo, toy, tmp_path):
    run = main_ppo(
        "+experiment=evaluate",
        "backend=cpu",
        "++verl_ext.prepare=null",
        f"model={toy / 'model'}",
        "base_model=somewhere/DeepSeek-R1-Distill-Qwen-1.5B",
        "method=mine",
        # Not on a CPU.
        "actor_rollout_ref.actor.fsdp_config.param_offload=false",
        "actor_rollout_ref.actor.fsdp_config.optimizer_offload=false",
        "trainer.val_before_train=true",
        ranks=2,
    )
    assert run.returncode == 0, run.output[-5000:]
    rows = read_metrics(run.folder)
    assert [row["step"] for row in rows] == [0] and 0 < rows[0]["val-core/toy/acc/mean@16"] < 1
    assert report.main([str(run.folder), "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report/report.md").read_text()
    assert "mine" in text and f"{100 * rows[0]['val-core/toy/acc/mean@16']:.1f}" in text


def test_batches_that_divide_unevenly_in_the_lagged_mode_with_the_rollouts_log_probs(main_ppo, tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text(
        "import numpy as np\n"
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):\n"
        "    total = sum(map(ord, solution_str))\n"
        "    if total % 6 == 0:\n"
        "        raise ArithmeticError('not my day')\n"
        "    return np.bool_(total % 2)\n"
    )
    # 3 questions x 3 responses a mini-batch, on 2 ranks by micro-batches of 4: 8 rows a rank, 7 of 16 are padding.
    run = main_ppo(
        "algorithm=disco",
        "disco.measure=lagged",
        "disco.delta=0",
        "algorithm.rollout_correction.bypass_mode=true",
        "data.train_batch_size=6",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.rollout.n=3",
        "actor_rollout_ref.actor.shuffle=true",
        "actor_rollout_ref.actor.ppo_epochs=2",
        "actor_rollout_ref.actor.use_dynamic_bsz=false",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8",
        f"reward.custom_reward_function.path={reward}",
        "++verl_ext.max_failed_rewards=0.6",
        "trainer.total_training_steps=3",
        ranks=2,
    )
    assert run.returncode == 0, run.output[-5000:]
    failed = [step["training/failed_rewards"] for step in run.metrics()]
    assert sum(failed) > 0
    for step, number in enumerate(failed, 1):
        text = f"{number} of 18 rewards of step {step} failed, the first with reward.custom_reward_function={reward}:"
        assert run.output.count(text) == (number > 0)
    assert "compute_score: ArithmeticError: not my day (reward.py:5)" in run.output
    for step in run.metrics():
        assert step["disco/measured"] == 0
        assert step["training/failed_questions"] == 0
        assert step["disco/questions"] == 3
        # verl logs none in this mode.
        assert step["disco/entropy"] > 0
        # The last mini-batches pay for the KL of those before.
        assert step["disco/coefficient"] != 0
        # Light rollout and actor compute alike, in float32.
        assert abs(step["disco/kl_floor"]) < 1e-5 and step["disco/kl_standard_error"] > 0
        assert step["disco/skipped_updates"] == 0
    # Responses whose rewards failed are no rows, so a batch may divide by chance.
    assert any(step["training/padding_rows"] > 0 for step in run.metrics())
    # The first mini-batch is trained on whole, for its entropy; others at least without padding.
    trained = [step["disco/trained_rows"] for step in run.metrics()]
    assert min(trained) < 1 and all(0.25 <= share <= 1 for share in trained)
    # Any error is above a delta of 0; it is said again where the error has changed threefold.
    assert run.output.count("disco.delta=0 is below what this batch can measure") in (1, 2)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["algorithm=disco", "actor_rollout_ref.rollout.n=1"],
            "actor_rollout_ref.rollout.n=1 does not work with DisCO",
        ),
        (["algorithm=disko"], "Available options in 'algorithm'"),
    ],
    ids=["n=1", "unknown algorithm"],
)
def test_wrong_settings_end_the_run_before_ray_starts(main_ppo, overrides, message):
    run = main_ppo(*overrides)
    assert run.returncode != 0
    assert message in run.output
    assert "Started a local Ray instance" not in run.output and "ray init kwargs" not in run.output
