"""DisCO in verl's asynchronous trainers: the policy that generates is older than the one that trains."""

import math

import pytest

ASYNCHRONOUS = (
    "algorithm=disco",
    "disco.delta=0",
    # The experiment's own waits until all is generated.
    "actor_rollout_ref.rollout.agent.agent_loop_manager_class=null",
    "actor_rollout_ref.actor.optim.lr=1e-3",
    "algorithm.rollout_correction.rollout_is=token",
)


def check(steps: list[dict]) -> None:
    assert [s["step"] for s in steps] == [1, 2]
    for step in steps:
        assert step["disco/questions"] == 3 and step["training/failed_questions"] == 0
        # pi_old is the policy at the step's start, whoever generated: the first update is free, and of those after it
        # the KL is measured.
        assert step["disco/measured"] == 0.5
        assert step["disco/kl"] != 0 and math.isfinite(step["disco/kl"])
        assert step["disco/coefficient"] > 0 or step["disco/kl"] < 0
        assert step["actor/grad_norm"] > 0
    # The importance weights tell an older policy from the one that trains.
    first, second = (s["rollout_corr/rollout_is_std"] for s in steps)
    # verl's formula cancels: up to 2e-4 where all weights are within 1e-6 of 1.
    assert first < 1e-3 < 1e-2 < second


@pytest.mark.slow
def test_rollouts_that_go_on_while_the_policy_trains(main_ppo):
    run = main_ppo(*ASYNCHRONOUS, "trainer.v1.trainer_mode=colocate_async")
    assert run.returncode == 0, run.output[-5000:]
    check(run.metrics())


def test_rollouts_on_devices_of_their_own(main_ppo):
    rollout = "actor_rollout_ref.rollout"
    run = main_ppo(
        *ASYNCHRONOUS,
        "trainer.v1.trainer_mode=separate_async",
        "trainer.v1.separate_async.parameter_sync_step=2",
        f"{rollout}.nnodes=1",
        f"{rollout}.n_gpus_per_node=1",
        f"{rollout}.checkpoint_engine.backend=ray",
        f"{rollout}.checkpoint_engine.custom_backend_module=verl_ext.cpu.checkpoint_engine",
        "ray_kwargs.ray_init.num_gpus=2",
    )
    assert run.returncode == 0, run.output[-5000:]
    check(run.metrics())
