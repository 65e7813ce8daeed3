"""A model, data and a reward of one's own on a CPU: a backend, and neither an experiment nor a task of ours."""

from omegaconf import OmegaConf


def test_three_steps(main_ppo, toy, tmp_path):
    run = main_ppo(
        "algorithm=disco",
        "+backend=cpu",
        f"model={toy / 'model'}",
        f"data.train_files={toy / 'train.parquet'}",
        f"data.val_files={toy / 'test.parquet'}",
        f"reward.custom_reward_function.path={toy / 'reward.py'}",
        # The toy model has 256 positions.
        "data.max_prompt_length=40",
        "data.max_response_length=16",
        "trainer.total_training_steps=3",
        f"hydra.run.dir={tmp_path}/hydra",
        bare=True,
        folder=tmp_path / "outputs/model",
    )
    assert run.returncode == 0, run.output[-5000:]
    (folder,) = run.folder.iterdir()
    assert folder.name.startswith("disco,") and folder.name.endswith(",seed=1")
    steps = run.metrics(folder.name)
    assert [step["step"] for step in steps] == [1, 2, 3]
    for step in steps:
        # The sizes of setting=small: two mini-batches of 8 questions, of which the second is measured.
        assert (step["disco/questions"], step["disco/measured"]) == (8, 0.5)
        assert step["disco/groups_mixed"] > 0 and step["actor/grad_norm"] > 0
    # verl evaluates first; by the preset, one greedy response per question.
    assert "val-core/toy/acc/mean@1" in (folder / "metrics.jsonl").read_text()
    config = OmegaConf.load(folder / "config.yaml")
    assert "arithmetic" not in config and config.actor_rollout_ref.model.path == str(toy / "model")
