"""What the method costs, in operations and bytes instead of seconds: less than verl's loss, and linear in rows."""

from dataclasses import fields, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recipe.disco import loss as loss_module
from recipe.disco import metrics, objectives, update
from recipe.disco.constraint import SquaredHinge
from recipe.disco.loss import micro_batch_loss
from recipe.disco.objectives import Disco
from recipe.disco.questions import DGPO
from recipe.disco.scores import SCORES
from recipe.disco.update import ScoreTable, plan_update, require_numbers

ROWS, TOKENS, LENGTHS = 4, 64, [64, 3, 17, 40]


class Results(TorchDispatchMode):
    """Number of elements that each operation writes, those of the backward pass included."""

    def __init__(self):
        super().__init__()
        self.written: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if not func.is_view:
            self.written.append(sum(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)))
        return out


def cost(loss) -> tuple[int, int]:
    """Passes over (ROWS, TOKENS) in both directions, and bytes of such tensors that are kept for the backward pass."""
    kept = {}

    def pack(x):
        if x.numel() == ROWS * TOKENS:
            kept[x.untyped_storage().data_ptr()] = x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), Results() as results:
        loss().backward()
    return sum(n == ROWS * TOKENS for n in results.written), sum(kept.values())


def micro_batch():
    g = torch.Generator().manual_seed(0)
    log_prob, old, ref, rho = (torch.rand(ROWS, TOKENS, generator=g) for _ in range(4))
    mask = torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None]
    return log_prob.requires_grad_(), old, mask, torch.randn(ROWS, generator=g), ref, rho


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("coefficient, estimator", [(0.0, "k1"), (0.5, "k1"), (0.5, "k3")])
@pytest.mark.parametrize("score", sorted(SCORES))
def test_the_loss_costs_less_than_half_of_verls(score, coefficient, estimator, corrected):
    from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla
    from verl.workers.config import ActorConfig

    log_prob, old, mask, weight, ref, rho = micro_batch()
    rho = rho if corrected else None
    config = ActorConfig(strategy="fsdp", rollout_n=8, use_dynamic_bsz=True)
    config.global_batch_info.update(dp_size=1, batch_num_tokens=sum(LENGTHS))
    advantages = weight[:, None].expand(ROWS, TOKENS).clone()
    theirs = cost(
        lambda: compute_policy_loss_vanilla(old, log_prob, advantages, mask, config=config, rollout_is_weights=rho)[0]
    )
    options = dict(kl_estimator=estimator, ref_log_prob=ref, rollout_is_weights=rho)
    rows = (log_prob, old, mask, weight, coefficient, sum(LENGTHS))
    ours = cost(lambda: micro_batch_loss(*rows, score=SCORES.build(score, {}), **options))
    assert all(0 < 2 * mine < other for mine, other in zip(ours, theirs, strict=True)), (ours, theirs)


def test_a_kl_that_costs_nothing_is_not_computed(monkeypatch):
    log_prob, old, mask, weight, *_ = micro_batch()
    monkeypatch.delattr(loss_module, "kl_estimate")
    micro_batch_loss(log_prob, old, mask, weight, 0.0, sum(LENGTHS), score=SCORES.build("log_l", {})).backward()
    in_words = (weight / mask.sum(-1))[:, None] * mask
    torch.testing.assert_close(log_prob.grad, -in_words)


def table(rows: int) -> ScoreTable:
    """Eight responses to each question, three of them right, in any order."""
    g = torch.Generator().manual_seed(0)
    order = torch.randperm(rows, generator=g)
    columns = dict(
        question=order // 8,
        session=order,
        size=torch.full((rows,), 8),
        index=order,
        reward=(order % 8 < 3).double(),
        length=torch.randint(1, 9, (rows,), generator=g),
        score=torch.randn(rows, generator=g, dtype=torch.float64),
        kl=torch.randn(rows, generator=g, dtype=torch.float64),
        measured=torch.ones(rows, dtype=torch.bool),
        entropy=torch.ones(rows, dtype=torch.float64),
    )
    return ScoreTable(**{f.name: columns[f.name] for f in fields(ScoreTable)})


def plan(rows: ScoreTable, **options):
    controller = SquaredHinge(delta=1e-4, beta=1e3)
    return plan_update(rows, Disco(tau=1.0), controller, positive_threshold=1.0, **options)


def test_a_plan_sorts_its_rows_once(monkeypatch):
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return by_question(*arguments)

    by_question = objectives.by_question
    for module in (objectives, metrics, update):
        monkeypatch.setattr(module, "by_question", counted)
    assert plan(table(64)).metrics["groups_mixed"] == 1
    assert len(calls) == 1


@pytest.mark.parametrize(
    "options, levels, most",
    [
        ({}, 1, 150),
        ({"question_weight": DGPO()}, 1, 150),
        ({"graded": True}, 1, 150),
        # Pairs of eight responses
        ({"graded": True}, 4, 320),
    ],
)
def test_a_plan_is_linear_in_rows(options, levels, most):
    written = []
    for rows in (512, 4096):
        whole = table(rows)
        whole = replace(whole, reward=whole.reward * (1 + whole.index % levels) / levels)
        with Results() as results:
            plan(whole, **options)
        written.append(sum(results.written) / rows)
    assert written[1] == pytest.approx(written[0], rel=0.02) and written[0] < most, written


@pytest.mark.parametrize(
    "values, refused",
    [
        ([1.0, torch.inf, -torch.inf], True),
        ([1.0, torch.nan, 1.0], True),
        # Finite numbers with an infinite sum
        ([3e38, 3e38, 3e38], False),
    ],
)
def test_a_sum_tells_whether_all_are_numbers(values, refused):
    values = torch.tensor(values)
    with_padding = torch.stack([values, torch.full((3,), torch.nan)], -1), torch.tensor([[True, False]] * 3)
    for arguments in ((values,), with_padding):
        if refused:
            with pytest.raises(ValueError, match="^x of sample 1 is NaN or infinite"):
                require_numbers("x", *arguments)
        else:
            require_numbers("x", *arguments)
