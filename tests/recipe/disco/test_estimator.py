"""`disco` in verl's registries: found there by name, and its advantages are the method's weights at pi_old."""

import numpy as np
import pytest
import torch
import verl  # noqa: F401  (activates the plugin)
from omegaconf import OmegaConf
from verl.protocol import DataProto
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

from verl_ext.training.advantages import estimating
from verl_ext.training.transfer import parse_key

LENGTH = torch.tensor([3, 2, 4, 2, 1, 0])
MASK = (torch.arange(4) < LENGTH[:, None]).long()
UID = np.array(["b", "b", "b", "a", "a", "pad"], dtype=object)
REWARD = torch.tensor([1.0, 0, 0, 1, 1, 0])


KEYS = tuple(f"u_{i}_0" for i in range(6))


def estimate(disco: dict, old: torch.Tensor, ref: torch.Tensor | None = None, keys=KEYS) -> torch.Tensor:
    """verl's own call for a batch, as our trainers make it."""
    config = OmegaConf.create({"disco": disco, "algorithm": {"adv_estimator": "disco"}})
    rewards = torch.zeros(6, 4)
    rewards[torch.arange(6), (LENGTH - 1).clamp(min=0)] = REWARD
    data = DataProto.from_single_dict({"response_mask": MASK, "token_level_rewards": rewards, "uid": UID})
    columns = {"old_log_probs": old, "ref_log_prob": ref}
    with estimating(config, columns.__getitem__, [parse_key(key) for key in keys]):
        found = compute_advantage_for_multi_trajectories(data, list(keys), "disco", config=config.algorithm)
    assert torch.equal(found.batch["advantages"], found.batch["returns"])
    return found.batch["advantages"]


def old_log_probs() -> torch.Tensor:
    return -torch.rand(6, 4, generator=torch.Generator().manual_seed(0))


def test_advantages_are_the_weights_in_the_questions_objective():
    """Question b: 1 for its positive, -softmax(s / tau) for its negatives, at every token; a is not mixed."""
    old = old_log_probs()
    found = estimate({"objective": "disco", "tau": 0.3}, old)
    s = (old * MASK).sum(-1)[1:3] / LENGTH[1:3]
    weight = [1.0, *(-torch.softmax(s / 0.3, 0)).tolist(), 0.0, 0.0, 0.0]
    torch.testing.assert_close(found, torch.tensor(weight)[:, None] * MASK)
    # Not GRPO's.
    grpo, _ = core_algos.compute_grpo_outcome_advantage(REWARD[:, None] * MASK / LENGTH[:, None], MASK, UID)
    assert not torch.allclose(grpo.nan_to_num(), found)


@pytest.mark.parametrize("disco", [{"objective": "disco_b", "negatives": "mean"}, {"score": "l_ratio", "tau": 1.0}])
def test_equal_weights_over_negatives(disco):
    """DisCO-b's always, and those of ratios, which are all 1 at pi_old."""
    found = estimate(disco, old_log_probs())
    torch.testing.assert_close(found, torch.tensor([1.0, -0.5, -0.5, 0, 0, 0])[:, None] * MASK)


@pytest.mark.parametrize(
    "disco, weight",
    [
        # One of three is right.
        ({"objective": "maxrl"}, [2 / 3, -1 / 3, -1 / 3, 0, 0, 0]),
        ({"objective": "disco_b", "questions": "dgpo"}, [1, -0.5, -0.5, 0, 0, 0]),
        ({"objective": "disco_b", "pairs": "graded"}, [1, -0.5, -0.5, 0, 0, 0]),
    ],
)
def test_weights_of_questions_and_graded_pairs_are_in_the_advantages(disco, weight):
    torch.testing.assert_close(estimate(disco, old_log_probs()), torch.tensor(weight)[:, None] * MASK)


def test_all_rows_of_a_session_have_its_weight():
    """The negatives of question b are one session of 2 + 4 tokens, whose last row's reward counts."""
    old = old_log_probs()
    found = estimate({"tau": 0.3}, old, keys=("u_0_0", "u_1_0", "u_1_1", "u_3_0", "u_4_0", "pad_0_0"))
    torch.testing.assert_close(found, torch.tensor([1.0, -1.0, -1.0, 0, 0, 0])[:, None] * MASK)


def test_a_score_to_the_reference_reads_its_log_probs():
    old = old_log_probs()
    found = estimate({"score": "log_ratio_ref", "tau": 0.3}, old, old - torch.tensor([0, 1.0, 2.0, 0, 0, 0])[:, None])
    share = torch.softmax(torch.tensor([1.0, 2.0]) / 0.3, 0)
    torch.testing.assert_close(found[:3, 0], torch.tensor([1.0, *(-share).tolist()]))


def test_another_trainer_is_refused_by_name():
    with pytest.raises(ValueError, match="algorithm.adv_estimator=disco needs the batch's log-probabilities"):
        core_algos.get_adv_estimator_fn("disco")(token_level_rewards=MASK * 1.0, response_mask=MASK, index=UID)
    with (
        estimating(OmegaConf.create({"algorithm": {}}), lambda name: MASK, []),
        pytest.raises(ValueError, match="start from algorithm=disco"),
    ):
        core_algos.get_adv_estimator_fn("disco")(token_level_rewards=MASK * 1.0, response_mask=MASK, index=UID)


def test_a_worker_that_is_not_ours_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="loss_mode=disco is computed by DisCO's own worker, .*; start from algorithm"):
        core_algos.get_policy_loss_fn("disco")(
            old_log_prob=MASK, log_prob=MASK, advantages=MASK, response_mask=MASK, loss_agg_mode="token-mean"
        )
