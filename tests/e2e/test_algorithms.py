"""Two steps of verl's real pipeline for each algorithm, on one and on two CPU ranks, as a multirun of one process."""

import math

import pytest

ALGORITHMS = ("ppo", "grpo", "dapo", "disco", "disco_b")


@pytest.mark.parametrize("ranks", [1, 2])
def test_two_steps_of_each_algorithm(main_ppo, tmp_path, ranks):
    run = main_ppo(
        "-m",
        f"algorithm={','.join(ALGORITHMS)}",
        "trainer.default_local_dir=" + str(tmp_path / "jobs") + "/${oc.select:verl_ext.algorithm,ppo}",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
        ranks=ranks,
        folder=tmp_path / "jobs",
        timeout=1500,
    )
    assert run.returncode == 0, run.output[-5000:]
    for algorithm in ALGORITHMS:
        steps = run.metrics(algorithm)
        assert [s["step"] for s in steps] == [1, 2], algorithm
        assert all(math.isfinite(s["actor/grad_norm"]) and s["actor/grad_norm"] > 0 for s in steps), algorithm
        assert all(s["actor/entropy"] > 0 for s in steps), algorithm
    for algorithm in ("disco", "disco_b"):
        for step in run.metrics(algorithm):
            assert step["disco/questions"] == 3
            assert step["disco/groups_mixed"] > 0
            # The first mini-batch of a step is free, the second is measured.
            assert step["disco/measured"] == 0.5
            assert step["disco/kl"] != 0
    # DisCO-b weighs its negatives alike, DisCO does not: the same first rollout, other updates.
    first = [run.metrics(a)[0] for a in ("disco", "disco_b")]
    assert first[0]["critic/score/mean"] == first[1]["critic/score/mean"]
    assert first[0]["disco/effective_negatives"] < first[1]["disco/effective_negatives"]
    assert first[0]["actor/grad_norm"] != first[1]["actor/grad_norm"]
    # DAPO trains on questions with right and wrong responses, whatever it had to draw for them.
    for step in run.metrics("dapo"):
        assert step["critic/advantages/min"] < 0 < step["critic/advantages/max"]
