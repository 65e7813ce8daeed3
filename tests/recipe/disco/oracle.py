"""The method, written a second time for the tests: float64, one Python loop over the questions, plain autograd.

It shares no code with `recipe.disco` and does not try to be fast or stable; it tries to be checkable by eye.
`uid` is a list of hashable values here, `mask` is anything that `bool()` understands.
"""

import math
from collections import defaultdict

import torch


def response_score(new, old, score):
    """Score of one response from its own tokens (1-D, no padding)."""
    if score == "log_l":
        return new.sum() / len(new)
    return (new - old).exp().sum() / len(new)


def token_kl(new, old, estimator):
    """KL(pi_old || pi_new) per token, estimated on tokens that pi_old sampled."""
    if estimator == "k1":
        return old - new
    ratio = (new - old).exp()
    return ratio - 1 - ratio.log()


def questions(log_prob, old_log_prob, mask, reward, uid, score, threshold):
    """{uid: (positive scores, negative scores)}; a response without tokens opens its question but has no score."""
    sides = defaultdict(lambda: ([], []))
    for i, name in enumerate(uid):
        keep = mask[i].bool()
        positives, negatives = sides[name]
        if keep.any():
            s = response_score(log_prob[i][keep].double(), old_log_prob[i][keep].double(), score)
            (positives if reward[i] >= threshold else negatives).append(s)
    return sides


def negative_side(scores, objective, tau):
    """neg of one question: the mean of the negatives' scores, or their softened maximum."""
    if objective == "disco_b":
        return sum(scores) / len(scores)
    top = max(s.item() for s in scores)  # taken out of the exponential and put back: changes nothing but overflow
    return top + tau * (sum(((s - top) / tau).exp() for s in scores) / len(scores)).log()


def oracle(
    log_prob, old_log_prob, mask, reward, uid, objective, score, tau, delta, beta, kl_estimator, positive_threshold=1.0
):
    """(L, facts): the loss as a float64 graph on `log_prob`, and the numbers that the metrics should report."""
    sides = questions(log_prob, old_log_prob, mask, reward, uid, score, positive_threshold)
    mixed = [(pos, neg) for pos, neg in sides.values() if pos and neg]
    upper = sum((sum(pos) / len(pos) for pos, _ in mixed), torch.zeros((), dtype=torch.float64)) / len(sides)
    lower = sum((negative_side(neg, objective, tau) for _, neg in mixed), torch.zeros((), dtype=torch.float64))
    lower = lower / len(sides)

    keep = mask.bool()
    kl = token_kl(log_prob[keep].double(), old_log_prob[keep].double(), kl_estimator).sum() / max(int(keep.sum()), 1)
    excess = kl - delta if kl > delta else kl * 0
    loss = -(upper - lower) + beta / 2 * excess**2

    facts = {
        "objective": (upper - lower).item(),
        "objective_positive": upper.item(),
        "objective_negative": lower.item(),
        "kl": kl.item(),
        "coefficient": beta * max(kl.item() - delta, 0.0),
        "penalty": beta / 2 * max(kl.item() - delta, 0.0) ** 2,
        "groups_mixed": len(mixed) / len(sides),
        "groups_all_positive": sum(1 for pos, neg in sides.values() if pos and not neg) / len(sides),
        "groups_all_negative": sum(1 for pos, neg in sides.values() if neg and not pos) / len(sides),
        "empty_responses": sum(1 for row in mask if not row.bool().any()),
    }
    lengths = {True: [], False: []}
    for row, r in zip(mask, reward, strict=True):
        if row.bool().any():
            lengths[bool(r >= positive_threshold)].append(int(row.bool().sum()))
    for side, values in (("positive", lengths[True]), ("negative", lengths[False])):
        if values:
            facts[f"length_{side}"] = sum(values) / len(values)
    if mixed:
        for side, scores in zip(("positive", "negative"), zip(*mixed, strict=True), strict=True):
            pooled = [s.item() for group in scores for s in group]
            facts[f"score_{side}"] = sum(pooled) / len(pooled)
        facts["effective_negatives"] = sum(effective_number(neg, objective, tau) for _, neg in mixed) / len(mixed)
        facts["auc"] = sum(pairs_in_order(pos, neg) for pos, neg in mixed) / len(mixed)
    return loss, facts


def effective_number(scores, objective, tau):
    """1 / sum of squared weights: n for equal weights, 1 when one negative carries everything."""
    if objective == "disco_b":
        return float(len(scores))
    top = max(s.item() for s in scores)
    e = [math.exp((s.item() - top) / tau) for s in scores]
    return sum(e) ** 2 / sum(x * x for x in e)


def pairs_in_order(pos, neg):
    """Share of (positive, negative) pairs whose positive scores higher; a tie is half a pair."""
    wins = [1.0 if p.item() > n.item() else 0.5 if p.item() == n.item() else 0.0 for p in pos for n in neg]
    return sum(wins) / len(wins)


def oracle_gradient(log_prob, *args, **kwargs):
    """(L, dL/dlog_prob, facts), the gradient in float64 and exactly zero wherever nothing depends on log_prob."""
    leaf = log_prob.detach().double().clone().requires_grad_()
    loss, facts = oracle(leaf, *args, **kwargs)
    if not loss.requires_grad:  # no response token in the whole batch
        return loss.item(), torch.zeros_like(leaf), facts
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.item(), grad, facts
