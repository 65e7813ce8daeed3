"""Each method's update on a tiny batch against a formula written by hand, and settings that contradict each other."""

import math

import pytest
import torch

from verl_ext.preflight.methods import validate
from verl_ext.recipes import describe_algorithms
from verl_ext.report.weights import batch_loss, compose, question_weights

WIDTH = 6


def make_batch() -> dict:
    """Three questions, mixed and of different sizes, lengths 2 to 6; token ratios on both sides of each clip."""
    g = torch.Generator().manual_seed(0)
    reward = torch.tensor([1, 0, 0, 1, 0, 0, 1, 1, 0, 0, 1], dtype=torch.float64)
    length = torch.tensor([6, 4, 5, 2, 3, 6, 4, 2, 5, 3, 4])

    def random(low, high):
        return low + (high - low) * torch.rand(len(reward), WIDTH, generator=g, dtype=torch.float64)

    log_prob = random(-0.6, -0.4)
    # One unlikely token of a wrong response: the only one whose covariance with the advantage is large.
    log_prob[5, 1] = -3.0
    old_log_prob = log_prob + random(-0.4, 0.4)
    # Ratios of 4 and of 20 in wrong responses: beyond the dual clips at 3 and 10.
    old_log_prob[1, 2], old_log_prob[4, 1] = log_prob[1, 2] - math.log(4), log_prob[4, 1] - math.log(20)
    return dict(
        log_prob=log_prob,
        old_log_prob=old_log_prob,
        ref_log_prob=log_prob + random(-0.4, 0.4),
        response_mask=(torch.arange(WIDTH) < length[:, None]).long(),
        reward=reward,
        uid=["a"] * 4 + ["b"] * 5 + ["c"] * 2,
        values=random(-0.5, 0.5),
        entropy=random(0.1, 1.0),
    )


class Tiny:
    """The batch as lists of per-token graphs, and the pieces that several methods' formulas share."""

    def __init__(self, batch: dict):
        self.lp, self.old, self.ref = batch["log_prob"], batch["old_log_prob"], batch["ref_log_prob"]
        self.reward, self.uid, self.values = batch["reward"], batch["uid"], batch["values"]
        self.entropy = batch["entropy"]
        self.length = batch["response_mask"].sum(-1).tolist()
        self.rows = range(len(self.uid))

    def group(self, i: int) -> list[int]:
        return [j for j in self.rows if self.uid[j] == self.uid[i]]

    def advantage(self, i: int, std: bool = True):
        rewards = self.reward[self.group(i)]
        centred = self.reward[i] - rewards.mean()
        return centred / (rewards.std() + 1e-6) if std else centred

    def tokens(self, i: int) -> range:
        return range(self.length[i])

    def sequence_mean(self, fn):
        """Mean over responses of the mean over tokens of ``fn(i, t)``."""
        return sum(sum(fn(i, t) for t in self.tokens(i)) / self.length[i] for i in self.rows) / len(self.uid)

    def token_mean(self, fn):
        return sum(fn(i, t) for i in self.rows for t in self.tokens(i)) / sum(self.length)

    def ratio(self, i: int, t: int):
        return (self.lp[i, t] - self.old[i, t]).exp()

    def clipped(self, a, ratio, low: float = 0.2, high: float = 0.2, dual: float = 3.0):
        """PPO's loss of a token, and the dual clip of those with a negative advantage."""
        loss = -torch.minimum(a * ratio, a * ratio.clamp(1 - low, 1 + high))
        return torch.minimum(loss, -a * dual) if a < 0 else loss

    def whitened(self, x: dict) -> dict:
        """{(i, t): value} with mean 0 and variance 1 over all tokens."""
        all_values = torch.stack([*x.values()])
        return {k: (v - all_values.mean()) / all_values.var().sqrt() for k, v in x.items()}

    def score(self, i: int, base=None):
        """Mean log-probability of a response, or log-ratio to ``base``."""
        return sum(self.lp[i, t] - (0 if base is None else base[i, t]) for t in self.tokens(i)) / self.length[i]

    def questions(self):
        """(right, wrong) responses of each question."""
        for name in dict.fromkeys(self.uid):
            members = [i for i in self.rows if self.uid[i] == name]
            yield [i for i in members if self.reward[i] > 0], [i for i in members if self.reward[i] == 0]

    def hinge(self, delta: float = 1e-4, beta: float = 1e3):
        kl = self.token_mean(lambda i, t: self.old[i, t] - self.lp[i, t])
        return beta / 2 * (kl - delta).clamp(min=0) ** 2


def ppo(b: Tiny):
    # GAE with gamma = lambda = 1: the reward minus the value of each token's state.
    a = b.whitened({(i, t): b.reward[i] - b.values[i, t] for i in b.rows for t in b.tokens(i)})
    return b.token_mean(lambda i, t: b.clipped(a[i, t], b.ratio(i, t)))


def grpo(b: Tiny):
    def loss(i, t):
        back = b.ref[i, t] - b.lp[i, t]
        return b.clipped(b.advantage(i), b.ratio(i, t)) + 0.04 * (back.exp() - back - 1)

    return b.sequence_mean(loss)


def grpo_er(b: Tiny):
    return grpo(b) - 0.001 * b.sequence_mean(lambda i, t: b.entropy[i, t])


def dr_grpo(b: Tiny):
    total = sum(b.clipped(b.advantage(i, std=False), b.ratio(i, t)) for i in b.rows for t in b.tokens(i))
    return total / 50 / len(b.uid)


def dapo(b: Tiny):
    return b.token_mean(lambda i, t: b.clipped(b.advantage(i), b.ratio(i, t), 0.2, 0.28, dual=10.0))


def gpg(b: Tiny):
    share_right = b.reward.count_nonzero() / len(b.reward)
    return b.token_mean(lambda i, t: -b.advantage(i, std=False) / share_right * b.lp[i, t])


def rloo(b: Tiny):
    def advantage(i):
        others = [b.reward[j] for j in b.group(i) if j != i]
        return b.reward[i] - sum(others) / len(others)

    return sum(b.clipped(advantage(i), b.ratio(i, t)) for i in b.rows for t in b.tokens(i)) / len(b.uid)


def maxrl(b: Tiny):
    def advantage(i):
        p = b.reward[b.group(i)].mean()
        return (b.reward[i] - p) / p

    return b.token_mean(lambda i, t: b.clipped(advantage(i), b.ratio(i, t)))


def dgpo(b: Tiny):
    # All three questions are mixed, so all tokens are of mixed ones.
    rate = {name: b.reward[[i for i in b.rows if b.uid[i] == name]].mean() for name in b.uid}
    total = sum((-p / 2).exp() for p in rate.values())

    def advantage(i):
        centred = [b.reward[j] - rate[b.uid[i]] for j in b.group(i)]
        balanced = len(centred) * (b.reward[i] - rate[b.uid[i]]) / sum(abs(x) for x in centred)
        return balanced * 3 * (-rate[b.uid[i]] / 2).exp() / total

    return b.token_mean(lambda i, t: b.clipped(advantage(i), b.ratio(i, t)))


def reinforce_pp(b: Tiny):
    a = b.whitened({(i, t): b.reward[i] for i in b.rows for t in b.tokens(i)})
    return b.token_mean(lambda i, t: b.clipped(a[i, t], b.ratio(i, t)))


def gspo(b: Tiny):
    return sum(b.clipped(b.advantage(i), b.score(i, b.old).exp(), 3e-4, 4e-4, math.inf) for i in b.rows) / len(b.uid)


def cispo(b: Tiny):
    return b.token_mean(lambda i, t: -b.ratio(i, t).clamp(max=1.2).detach() * b.advantage(i) * b.lp[i, t])


def sapo(b: Tiny):
    def loss(i, t):
        a = b.advantage(i)
        tau = 1.0 if a > 0 else 1.05
        return -a * 4 / tau * torch.sigmoid(tau * (b.ratio(i, t) - 1))

    return b.sequence_mean(loss)


def clip_cov(b: Tiny):
    def loss(i, t):
        return 0 if (i, t) == (5, 1) else b.clipped(b.advantage(i), b.ratio(i, t), dual=math.inf)

    return b.token_mean(loss)


def kl_cov(b: Tiny):
    def loss(i, t):
        penalty = (b.lp[i, t] - b.old[i, t]).abs() if (i, t) == (5, 1) else 0
        return -b.advantage(i) * b.ratio(i, t) + penalty

    return b.token_mean(loss)


def soft_maximum(scores, tau: float):
    return tau * torch.stack([(s / tau).exp() for s in scores]).mean().log()


def disco(b: Tiny):
    gain = 0
    for right, wrong in b.questions():
        gain = gain + sum(b.score(i) for i in right) / len(right) - soft_maximum([b.score(j) for j in wrong], 10)
    return -gain / 3 + b.hinge()


def disco_b(b: Tiny):
    gain = 0
    for right, wrong in b.questions():
        gain = gain + sum(b.score(i) - b.score(j) for i in right for j in wrong) / len(right) / len(wrong)
    return -gain / 3 + b.hinge()


def drpo(b: Tiny):
    gain = 0
    for right, wrong in b.questions():
        weight = [math.exp((1 - b.length[i] / 50) / 0.1) for i in right]
        pull = sum(w / sum(weight) * b.score(i) for w, i in zip(weight, right, strict=True))
        gain = gain + pull - soft_maximum([b.score(j) for j in wrong], 10)
    return -gain / 3 + b.hinge()


def real(b: Tiny):
    loss = 0
    for right, wrong in b.questions():
        loss = loss + (1 + sum((-b.score(i, b.old) / 0.5).exp() for i in right)).log()
        loss = loss + (1 + sum((b.score(j, b.old) / 0.5).exp() for j in wrong)).log()
    return loss / 3


def trpa(b: Tiny):
    gain = 0
    for right, wrong in b.questions():
        pairs = [0.25 * (b.score(i, b.ref) - b.score(j, b.ref)) for i in right for j in wrong]
        gain = gain + sum(torch.sigmoid(d).log() for d in pairs) / len(pairs)
    return -gain / 3 + 0.001 * b.token_mean(lambda i, t: b.ratio(i, t) - 1 - (b.lp[i, t] - b.old[i, t]))


def conspo(b: Tiny):
    gain = 0
    for right, wrong in b.questions():
        against = sum((b.score(j) / 10).exp() for j in wrong)
        led = [((b.score(i) - 0.01) / 10).exp() for i in right]
        gain = gain + sum(10 * (x / (x + against)).log() for x in led) / len(right)
    return -gain / 3


FORMULAS = dict(
    ppo=ppo,
    grpo=grpo,
    grpo_er=grpo_er,
    dr_grpo=dr_grpo,
    dapo=dapo,
    gpg=gpg,
    rloo=rloo,
    maxrl=maxrl,
    dgpo=dgpo,
    reinforce_pp=reinforce_pp,
    gspo=gspo,
    cispo=cispo,
    sapo=sapo,
    clip_cov=clip_cov,
    kl_cov=kl_cov,
    trpa=trpa,
    disco=disco,
    disco_b=disco_b,
    drpo=drpo,
    real=real,
    conspo=conspo,
)


def test_every_method_has_a_formula():
    assert set(FORMULAS) == set(describe_algorithms())


@pytest.mark.parametrize("algorithm", FORMULAS)
def test_the_update_equals_the_formula(algorithm):
    gradients = []
    config = compose(algorithm, "data.max_response_length=50")
    for fn in (lambda batch: batch_loss(config, **batch), lambda batch: FORMULAS[algorithm](Tiny(batch))):
        batch = make_batch()
        leaf, bonus = batch["log_prob"].requires_grad_(), batch["entropy"].requires_grad_()
        gradients.append(torch.autograd.grad(fn(batch), [leaf, bonus], allow_unused=True, materialize_grads=True))
    (found, found_entropy), (expected, expected_entropy) = gradients
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found_entropy, expected_entropy, rtol=1e-5, atol=1e-12)
    assert bool(expected_entropy.any()) == (algorithm == "grpo_er")


@pytest.mark.parametrize(
    "algorithm, weight",
    [
        ("grpo", lambda p, n: math.sqrt(p * (1 - p) * (n - 1) / n)),
        ("dr_grpo", lambda p, n: p * (1 - p)),
        ("disco", lambda p, n: 1.0),
        ("maxrl", lambda p, n: 1 - p),
        ("dgpo", lambda p, n: 0.5 * (n - 1) * math.exp(-p / 2) / sum(math.exp(-i / n / 2) for i in range(1, n))),
    ],
)
def test_the_weights_of_questions_are_proposition_1s(algorithm, weight):
    # verl divides by the sample's standard deviation, hence (n - 1) / n for GRPO.
    n = 8
    found = question_weights(compose(algorithm, "data.max_response_length=8", f"actor_rollout_ref.rollout.n={n}"), n)
    assert found == pytest.approx([weight(right / n, n) for right in range(1, n)], rel=1e-5)


@pytest.mark.parametrize(
    "algorithm, override, message",
    [
        ("grpo", "actor_rollout_ref.rollout.n=1", "actor_rollout_ref.rollout.n=1 .* use n >= 2"),
        ("rloo", "actor_rollout_ref.rollout.n=1", "adv_estimator=rloo compares"),
        ("grpo", "algorithm.adv_estimator=grop", "algorithm.adv_estimator=grop .*verl has .*'grpo'"),
        ("grpo", "actor_rollout_ref.actor.policy_loss.loss_mode=vanila", "loss_mode=vanila .*verl has .*'vanilla'"),
        ("grpo", "critic.enable=true", "critic.enable=True .* reads no values"),
        ("grpo", "algorithm.use_kl_in_reward=true", "would count twice"),
        ("dgpo", "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean", "use token-mean"),
        ("dgpo", "algorithm.use_kl_in_reward=true", "adv_estimator=dgpo goes by pass rates; use false"),
        ("maxrl", "algorithm.use_kl_in_reward=true", "adv_estimator=maxrl goes by pass rates; use false"),
        ("sapo", "actor_rollout_ref.actor.loss_agg_mode=token-mean", "use seq-mean-token-mean"),
        ("dr_grpo", "actor_rollout_ref.actor.loss_scale_factor=null", "such as data.max_response_length"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(algorithm, override, message):
    group = ["actor_rollout_ref.rollout.n=8"]
    validate(compose(algorithm, *group))
    with pytest.raises(ValueError, match=message):
        validate(compose(algorithm, *group, override))


def test_maxrl_refuses_a_reward_manager_that_takes_reward_off_wrong_responses():
    buffer = "+reward.reward_kwargs.overlong_buffer_cfg"
    dapos = ["reward.reward_manager.name=dapo", f"{buffer}.len=4", "+reward.reward_kwargs.max_resp_len=8"]
    group = ["actor_rollout_ref.rollout.n=8"]
    validate(compose("maxrl", *group, *dapos, f"{buffer}.enable=false"))
    with pytest.raises(ValueError, match="overlong_buffer_cfg.enable=True .*maxrl needs 0; use false"):
        validate(compose("maxrl", *group, *dapos, f"{buffer}.enable=true"))


@pytest.mark.parametrize(
    "algorithm", sorted(set(FORMULAS) - {"ppo", "reinforce_pp", "disco", "disco_b", "drpo", "real", "trpa", "conspo"})
)
def test_a_group_method_without_a_preset_says_what_it_needs(algorithm):
    with pytest.raises(ValueError, match="actor_rollout_ref.rollout.n=1 .* use n >= 2"):
        validate(compose(algorithm))


def test_a_reference_model_without_a_weight_is_refused():
    with pytest.raises(ValueError, match="use_kl_loss=True .*reference model would be loaded but unused"):
        reference = ["actor_rollout_ref.actor.use_kl_loss=true", "actor_rollout_ref.actor.kl_loss_coef=0"]
        validate(compose("dapo", "actor_rollout_ref.rollout.n=8", *reference))
