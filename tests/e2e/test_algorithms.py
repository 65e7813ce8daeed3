"""Two steps of verl's real pipeline for each algorithm, on CPU ranks, as one sweep."""

import math

import pytest

from verl_ext.recipes import describe_algorithms
from verl_ext.runs.evaluations import QUESTIONS, WEIGHT

FEW = ("ppo", "dapo")
"""A critic, and dynamic sampling. The other code paths are in test_disco (measured mini-batches) and test_two_nodes (a
reference model, and scores against it)."""

ALL = tuple(describe_algorithms())
FAMILY = ("disco", "disco_b", "drpo", "real", "trpa", "conspo")
"""What recipe.disco trains."""


@pytest.mark.parametrize(
    "algorithms, ranks",
    [
        pytest.param(FEW, 2, id="a few on two ranks"),
        pytest.param(tuple(a for a in ALL if a not in FEW), 2, id="the others on two ranks", marks=pytest.mark.slow),
        pytest.param(FAMILY, 1, id="the family on one rank", marks=pytest.mark.slow),
        pytest.param(tuple(a for a in ALL if a not in FAMILY), 1, id="the others on one rank", marks=pytest.mark.slow),
    ],
)
def test_two_steps_of_each_algorithm(main_ppo, tmp_path, algorithms, ranks):
    run = main_ppo(
        "-m",
        f"algorithm={','.join(algorithms)}",
        # In place of the one directory of a single run.
        "trainer.default_local_dir=" + str(tmp_path / "jobs") + "/${oc.select:verl_ext.algorithm,ppo}",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
        # For verl's own losses; the family's worker does it anyway.
        *(["++verl_ext.skip_rows_without_gradient=true"] if algorithms == FEW else []),
        # Enough that questions have several negatives and positives: with one of a kind some methods are the same.
        "actor_rollout_ref.rollout.n=8",
        ranks=ranks,
        folder=tmp_path / "jobs",
        timeout=180 * len(algorithms),
    )
    assert run.returncode == 0, run.output[-5000:]
    for algorithm in algorithms:
        steps = run.metrics(algorithm)
        assert [s["step"] for s in steps] == [1, 2], algorithm
        assert all(math.isfinite(s["actor/grad_norm"]) and s["actor/grad_norm"] > 0 for s in steps), algorithm
        assert all(s["actor/entropy"] > 0 for s in steps), algorithm
        assert all(0 < s["training/mixed_questions"] <= 1 for s in steps), algorithm
        for step in steps:
            assert sum(step[name] for name in QUESTIONS) == pytest.approx(1), algorithm
            assert sum(step[name] for name in WEIGHT) == pytest.approx(1), algorithm
            if algorithm in (*FAMILY, "grpo"):
                # A question whose responses got the same reward has no weight.
                assert step[WEIGHT[0]] == step[WEIGHT[-1]] == 0, algorithm
        if algorithm in FAMILY:
            for step in steps:
                assert step["disco/questions"] == 3
                assert step["disco/groups_mixed"] > 0
                # The first mini-batch of a step is free, the second is measured.
                assert step["disco/measured"] == 0.5
                assert step["disco/kl"] != 0
        if algorithms == FEW:
            assert all(0 < s["actor/trained_rows"] <= 1 and s["actor/trained_tokens"] > 0 for s in steps)
        if algorithm == "dapo":
            # It trains on questions with right and wrong responses, whatever it had to draw for them.
            assert all(s["training/mixed_questions"] == 1 for s in steps)
        if algorithm == "grpo_er":
            assert all(s["actor/entropy_loss"] > 0 for s in steps)
    # The same first rollout, other updates. (An untrained model's responses are all as long as can be, and among such
    # DRPO is DisCO.)
    first = {a: run.metrics(a)[0] for a in algorithms if a in FAMILY and a != "drpo"}
    assert len({s["critic/score/mean"] for s in first.values()}) == min(len(first), 1)
    assert len({s["actor/grad_norm"] for s in first.values()}) == len(first)


@pytest.mark.slow
def test_an_objective_of_ones_own_on_questions_that_teach(main_ppo):
    from pathlib import Path

    example = Path(__file__).resolve().parents[2] / "examples/custom_objective.py"
    run = main_ppo(
        "algorithm=disco",
        f"disco.module={example}",
        "disco.objective=margin_by_length",
        "+disco.options.margin=0.2",
        # Dynamic sampling
        "algorithm.filter_groups.enable=true",
        ranks=2,
    )
    assert run.returncode == 0, run.output[-5000:]
    steps = run.metrics()
    assert len(steps) == 2 and any(s.get("training/filter_groups/evicted_samples", 0) > 0 for s in steps)
    for step in steps:
        assert step["training/mixed_questions"] == step["disco/groups_mixed"] == 1 and step["disco/questions"] == 3
        assert step["disco/objective"] < 0 and step["disco/objective_negative"] == 0
        assert step["actor/grad_norm"] > 0
