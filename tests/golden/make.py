"""Write the reference vectors beside this file: the losses once more, from the papers' formulas.

    python tests/golden/make.py [FOLDER]

Needs Python alone. All is computed to 45 decimal digits, so every machine writes the same bytes. Gradients are central
differences of the loss itself with a step of 1e-14, so there is no formula of a derivative that could be wrong. Inputs
are multiples of 1/1024, which float32 and float64 hold exactly.

A file is a batch: per response its tokens' log-probabilities under the policy, pi_old and a reference, importance
weights of a rollout correction (used by the variants that say so), reward and question; and variants: settings of
`disco_loss` and what it should give, the gradient per response token.
"""

import json
import math
import random
import sys
from collections.abc import Callable
from decimal import Decimal, getcontext
from pathlib import Path

getcontext().prec = 45
STEP = Decimal("1e-14")
ZERO, ONE = Decimal(0), Decimal(1)
COSINES = {ZERO: ONE, Decimal("0.5"): ZERO, ONE: -ONE}
"""cos(pi x) where no function is needed."""


def mean(values: list[Decimal]) -> Decimal:
    return sum(values, ZERO) / len(values)


def token_values(score: str, new: list[Decimal], old: list[Decimal], ref: list[Decimal]) -> list[Decimal]:
    """A response's score is the mean of these over its tokens."""
    if score == "log_l":
        return new
    if score == "l_ratio":
        return [(n - o).exp() for n, o in zip(new, old, strict=True)]
    base = {"log_ratio": old, "log_ratio_ref": ref}[score]
    return [n - b for n, b in zip(new, base, strict=True)]


def surrogate(name: str, d: Decimal) -> Decimal:
    if name == "logistic":
        return -(ONE + (-d).exp()).ln()
    if name == "squared_hinge":
        return -(max(ONE - d, ZERO) ** 2)
    return d


def over_negatives(name: str, gains: list[Decimal], tau: Decimal, top_share: Decimal) -> Decimal:
    """Mean, DRO form (soft minimum) or mean of the smallest share of the gains over a question's negatives."""
    if name == "softmax":
        return -tau * mean([(-g / tau).exp() for g in gains]).ln()
    if name == "topk":
        gains = sorted(gains)[: math.ceil(top_share * len(gains))]
    return mean(gains)


def worth(positives: list[Decimal], negatives: list[Decimal], lengths: list[int], settings: dict) -> Decimal:
    """J_q of one question; ``lengths`` are its positives'."""
    s = {"surrogate": "identity", "negatives": "softmax", "scale": 1, "top_share": Decimal("0.25"), "tau": 10}
    s |= {k: Decimal(v) if isinstance(v, int | float) else v for k, v in settings.items()}
    tau, kind = Decimal(s["tau"]), s.get("objective", "disco")
    hardest = tau * mean([(x / tau).exp() for x in negatives]).ln()
    if kind == "real":
        against = ONE + sum((x / tau).exp() for x in negatives)
        return -(ONE + sum((-x / tau).exp() for x in positives)).ln() - against.ln()
    if kind == "conspo":
        done = min(Decimal(str(s.get("progress", 1))) / Decimal(str(s.get("margin_warmup", "0.3"))), ONE)
        margin = Decimal(str(s.get("target_margin", "0.01"))) * (ONE - COSINES[done]) / 2
        against = sum((x / tau).exp() for x in negatives)
        return tau * mean([a - (a.exp() + against).ln() for a in ((x - margin) / tau for x in positives)])
    if kind == "drpo":
        w = [((ONE - n / s["max_length"]) / s["length_temperature"]).exp() for n in lengths]
        return sum(a * x for a, x in zip(w, positives, strict=True)) / sum(w) - hardest
    if kind == "disco" and s["surrogate"] == "identity" and s["negatives"] == "softmax" and s["scale"] == 1:
        return mean(positives) - hardest
    if kind in ("disco_b", "maxrl"):
        s["negatives"] = "mean"
    gains = [[surrogate(s["surrogate"], s["scale"] * (p - n)) for n in negatives] for p in positives]
    return mean([over_negatives(s["negatives"], row, tau, s["top_share"]) for row in gains])


def graded_worth(scores: list[Decimal], rewards: list[Decimal], settings: dict) -> Decimal:
    """J_q of one question over all pairs with r_i > r_j, weighted by r_i - r_j: of the pairwise family alone."""
    s = {"surrogate": "identity", "negatives": "softmax", "scale": 1, "top_share": Decimal("0.25"), "tau": 10}
    s |= {k: Decimal(v) if isinstance(v, int | float) else v for k, v in settings.items()}
    tau, total, worths = Decimal(s["tau"]), ZERO, ZERO
    for high, r in zip(scores, rewards, strict=True):
        below = [
            (r - q, surrogate(s["surrogate"], s["scale"] * (high - low)))
            for low, q in zip(scores, rewards, strict=True)
            if q < r
        ]
        if not below:
            continue
        apart = sum(w for w, _ in below)
        if s["objective"] == "disco" and s["negatives"] == "softmax":
            found = -tau * (sum(w * (-g / tau).exp() for w, g in below) / apart).ln()
        else:
            if s["objective"] == "disco" and s["negatives"] == "topk":
                below = sorted(below, key=lambda pair: pair[1])[: math.ceil(s["top_share"] * len(below))]
            found = sum(w * g for w, g in below) / sum(w for w, _ in below)
        worths, total = worths + apart * found, total + apart
    return worths / total


def factors(rates: list[Decimal], settings: dict) -> list[Decimal]:
    """How much each mixed question counts, of their pass rates (mean rewards)."""
    own = "failure_rate" if settings.get("objective") == "maxrl" else "uniform"
    kind = settings.get("questions", own)
    if kind == "dgpo":
        e = [(-p / Decimal(settings.get("question_temperature", 2))).exp() for p in rates]
        return [len(e) * x / sum(e) for x in e]
    return [{"uniform": ONE, "failure_rate": 1 - p, "grpo": (p * (1 - p)).sqrt()}[kind] for p in rates]


def penalty(kl: Decimal, settings: dict, multiplier: Decimal = ZERO) -> Decimal:
    s = {"delta": "1e-4", "beta": 1000, "rho": 1000} | settings
    over = kl - Decimal(s["delta"])
    kind = s.get("constraint", "squared_hinge")
    if kind == "squared_hinge":
        return Decimal(s["beta"]) / 2 * max(over, ZERO) ** 2
    if kind == "augmented_lagrangian":
        rho = Decimal(s["rho"])
        return (max(multiplier + rho * over, ZERO) ** 2 - multiplier**2) / (2 * rho)
    return Decimal(s["coefficient"]) * kl if kind == "fixed" else ZERO


def divergence(new: list[list[Decimal]], old: list[list[Decimal]], settings: dict) -> Decimal:
    """KL(pi_old || pi_theta): k1 or k3, averaged over all response tokens."""
    log_ratio = [n - o for a, b in zip(new, old, strict=True) for n, o in zip(a, b, strict=True)]
    if settings.get("kl_estimator", "k1") == "k1":
        return mean([-x for x in log_ratio])
    return mean([x.exp() - 1 - x for x in log_ratio])


def gain(scores: list[Decimal | None], batch: dict, settings: dict) -> Decimal:
    """J: the mean of J_q over all questions, where one without both kinds adds 0."""
    questions: dict[object, list[tuple[Decimal, Decimal, int]]] = {}
    for score, reward, uid, tokens in zip(scores, batch["reward"], batch["uid"], batch["log_prob"], strict=True):
        members = questions.setdefault(uid, [])
        if score is not None:
            members.append((score, Decimal(reward), len(tokens)))
    rates, worths = [], []
    for members in questions.values():
        if settings.get("pairs") == "graded":
            rewards = [r for _, r, _ in members]
            if len(set(rewards)) > 1:
                worths.append(graded_worth([s for s, _, _ in members], rewards, settings))
                rates.append(mean(rewards))
            continue
        right = [m for m in members if m[1] >= Decimal(settings.get("positive_threshold", 1.0))]
        wrong = [m for m in members if m not in right]
        if right and wrong:
            worths.append(worth([m[0] for m in right], [m[0] for m in wrong], [m[2] for m in right], settings))
            rates.append(ONE * len(right) / len(members))
    c = factors(rates, settings)
    return sum((x * y for x, y in zip(c, worths, strict=True)), ZERO) / len(questions)


def slope(fn: Callable[[Decimal], Decimal], at: Decimal) -> Decimal:
    return (fn(at + STEP) - fn(at - STEP)) / (2 * STEP)


def expected(batch: dict, settings: dict) -> dict:
    """L, J, KL, the penalty's value and derivative, and dL/dlog_prob."""
    new, old, ref = ([[Decimal(x) for x in row] for row in batch[k]] for k in ("log_prob", "old_log_prob", "ref"))
    kind = settings.get("score", "log_l")

    def scores(new: list[list[Decimal]]) -> list[Decimal | None]:
        rows = zip(new, old, ref, strict=True)
        return [mean(token_values(kind, *row)) if row[0] else None for row in rows]

    def loss(new: list[list[Decimal]]) -> Decimal:
        return -gain(scores(new), batch, settings) + penalty(divergence(new, old, settings), settings)

    def moved(i: int, t: int, value: Decimal) -> list[list[Decimal]]:
        return [*new[:i], [*new[i][:t], value, *new[i][t + 1 :]], *new[i + 1 :]]

    def derivative(i: int, t: int) -> Decimal:
        if not settings.get("rollout_is_weights"):
            return slope(lambda x: loss(moved(i, t, x)), new[i][t])
        # The weights of a rollout correction multiply a token's part of dJ; neither what J compares, nor the KL.
        at = scores(new)
        by_score = slope(lambda x: gain([*at[:i], x, *at[i + 1 :]], batch, settings), at[i])
        by_token = slope(lambda x: scores(moved(i, t, x))[i], new[i][t])
        by_penalty = slope(lambda x: penalty(divergence(moved(i, t, x), old, settings), settings), new[i][t])
        return -Decimal(batch["rollout_is_weights"][i][t]) * by_score * by_token + by_penalty

    kl = divergence(new, old, settings)
    return {
        "loss": float(loss(new)),
        "objective": float(gain(scores(new), batch, settings)),
        "kl": float(kl),
        "penalty": float(penalty(kl, settings)),
        "coefficient": float(slope(lambda x: penalty(x, settings), kl)),
        "gradient": [[float(derivative(i, t)) for t in range(len(row))] for i, row in enumerate(new)],
    }


def draw(seed: int, groups: list[str], longest: int, drift: float) -> dict:
    """A batch of questions. A group is one letter per response; rows are shuffled.

    p(ositive), n(egative), e(mpty), or a digit: the reward in eighths.
    """
    rng = random.Random(seed)

    def number(low: float, high: float) -> float:
        return round((low + (high - low) * rng.random()) * 1024) / 1024

    rows = []
    for uid, group in enumerate(groups):
        for letter in group:
            length = 0 if letter == "e" else 1 + int(rng.random() * longest)
            new = [number(-3, -0.01) for _ in range(length)]
            old, ref = ([x + number(-0.8 * drift, drift) for x in new] for _ in range(2))
            rho = [number(0, 2) for _ in new]
            reward = int(letter) / 8 if letter.isdigit() else 1.0 if letter == "p" else 0.25
            rows.append((rng.random(), new, old, ref, rho, reward, f"q{uid}"))
    names = ("log_prob", "old_log_prob", "ref", "rollout_is_weights", "reward", "uid")
    return dict(zip(names, map(list, zip(*(row[1:] for row in sorted(rows)), strict=True)), strict=True))


BATCHES = {
    # Groups of all sizes, in any order; two questions of one kind, one without any token.
    "uneven": draw(1, ["ppn", "epnnnn", "pnn", "pp", "nn", "ee"], 4, 0.3),
    # Nothing to compare: the constraint alone acts.
    "unmixed": draw(2, ["pp", "n", "nn", "en"], 4, 0.3),
    # One pair, whose responses are a token each.
    "pair": draw(3, ["pn"], 1, 0.3),
    # Far from pi_old, scores far apart.
    "far": draw(4, ["pppnnn", "pn", "nnnp"], 3, 3.0),
    # Rewards of several levels; questions with two levels, and with one.
    "graded": draw(5, ["08433", "e7120", "8800", "35", "444", "88", "2e"], 4, 0.3),
}

SCORES = ("log_l", "l_ratio", "log_ratio", "log_ratio_ref")
FAMILY = [
    {"objective": "disco", "surrogate": s, "negatives": a, "scale": 1.5, "tau": 0.7, "top_share": 0.5}
    for s in ("identity", "logistic", "squared_hinge")
    for a in ("softmax", "mean", "topk")
]
DISCO, DRPO = {"objective": "disco"}, {"objective": "drpo", "length_temperature": 0.1, "max_length": 8}
CONSPO = {"objective": "conspo", "target_margin": 0.25, "margin_warmup": 0.5}
OBJECTIVES = [
    {**DISCO, "tau": 10.0},
    {**DISCO, "tau": 0.1},
    {"objective": "disco_b"},
    {"objective": "disco_b", "surrogate": "logistic", "scale": 4.0},
    {**DRPO, "tau": 10.0},
    {"objective": "real", "tau": 0.5},
]
CONSTRAINTS = [
    {"delta": 0.5, "beta": 1000.0},
    {"delta": 0.01, "beta": 100.0},
    {"constraint": "augmented_lagrangian", "delta": 0.01, "rho": 50.0},
    {"constraint": "fixed", "coefficient": 0.25},
    {"constraint": "none"},
]
QUESTIONS = [
    {"questions": "failure_rate"},
    {"questions": "dgpo"},
    {"questions": "dgpo", "question_temperature": 0.25},
    {"questions": "grpo"},
]
GRADED = {"pairs": "graded"}
TRPA = {**DISCO, "surrogate": "logistic", "negatives": "mean", "score": "log_ratio_ref", "scale": 0.25}
VARIANTS = {
    "uneven": [
        # The published constants.
        {**DISCO, "score": "log_l", "tau": 10.0},
        {**DISCO, "score": "l_ratio", "tau": 1.0},
        *({**o, "score": s, **CONSTRAINTS[4]} for o in OBJECTIVES for s in SCORES),
        *({**o, "score": s, **CONSTRAINTS[4]} for o in FAMILY for s in ("log_l", "l_ratio")),
        *({**DISCO, "kl_estimator": k, **c} for k in ("k1", "k3") for c in CONSTRAINTS),
        {**TRPA, "constraint": "fixed", "coefficient": 0.001, "kl_estimator": "k3"},
        {**DISCO, "positive_threshold": 0.25},
        {**DISCO, "score": "l_ratio", "tau": 1.0, "rollout_is_weights": True, **CONSTRAINTS[1]},
        *({"objective": "maxrl", "score": s, **c} for s in SCORES[:2] for c in (CONSTRAINTS[0], CONSTRAINTS[4])),
        {"objective": "maxrl", "surrogate": "logistic", "scale": 4.0},
        *({**o, **q, **CONSTRAINTS[4]} for o in (OBJECTIVES[1], OBJECTIVES[2], OBJECTIVES[5]) for q in QUESTIONS),
        {"objective": "real", "score": "log_ratio", "tau": 0.5, "rollout_is_weights": True, "kl_estimator": "k3"},
        *({**CONSPO, "tau": t, "score": s, "progress": 0.25} for t in (10.0, 0.25) for s in SCORES[:2]),
        *({**CONSPO, "tau": 0.25, "progress": p} for p in (0.0, 0.5)),
        {**CONSPO, "tau": 0.25, **CONSTRAINTS[4]},
    ],
    "graded": [
        *({**o, **GRADED, "score": s} for o in (*OBJECTIVES[:4], *FAMILY) for s in ("log_l", "l_ratio")),
        *({**o, **GRADED, **q, **CONSTRAINTS[4]} for o in (OBJECTIVES[1], OBJECTIVES[2]) for q in QUESTIONS),
        *({**o, **q, "positive_threshold": 0.5} for o in (OBJECTIVES[0], OBJECTIVES[4]) for q in QUESTIONS),
    ],
    "unmixed": [{**DISCO, "kl_estimator": k, **c} for k in ("k1", "k3") for c in CONSTRAINTS[:2]],
    "pair": [{**o, "score": s} for o in OBJECTIVES for s in ("log_l", "l_ratio")],
    "far": [{**DISCO, "score": s, "tau": t} for s in SCORES for t in (1e-3, 1e-2, 1e3, 1e6)]
    + [{**o, "score": "l_ratio", "kl_estimator": "k3"} for o in (*FAMILY[3:], *OBJECTIVES[2:])],
}


def multipliers(kls: list[float], delta: float, rho: float) -> list[dict]:
    """The augmented Lagrangian over steps whose last KLs are ``kls``: lambda <- max(0, lambda + rho (KL - delta))."""
    settings, value, steps = {"constraint": "augmented_lagrangian", "delta": delta, "rho": rho}, ZERO, []
    for kl in map(Decimal, kls):
        price = slope(lambda x, m=value: penalty(x, settings, m), kl)
        steps.append({"kl": float(kl), "penalty": float(penalty(kl, settings, value)), "coefficient": float(price)})
        value = max(ZERO, value + Decimal(rho) * (kl - Decimal(delta)))
        steps[-1]["multiplier_after"] = float(value)
    return steps


def write(folder: Path) -> None:
    """Write all files: one line per variant, so that a change can be read."""

    def dump(name: str, head: dict, key: str, rows: list[dict]) -> None:
        lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in head.items()]
        lines.append(f'"{key}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]")
        (folder / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")

    for name, batch in BATCHES.items():
        dump(name, batch, "variants", [{"settings": s, **expected(batch, s)} for s in VARIANTS[name]])
    settings = {"delta": 0.0078125, "rho": 64.0}
    kls = [0.0, 0.015625, 0.03125, 0.0078125, 0.0, 0.0, -0.125, 0.25]
    dump("augmented_lagrangian", settings, "steps", multipliers(kls, **settings))


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
