"""The supervised pre-training: labels, the optimizer, and that the loss falls."""

import random

import pytest
import torch

from verl_ext.tasks.arithmetic import pretrain as module
from verl_ext.tasks.arithmetic.model import build_model, build_tokenizer
from verl_ext.tasks.arithmetic.pretrain import Muon, collate, encode, pretrain
from verl_ext.tasks.arithmetic.task import LEVELS, draw_many


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_labels_are_the_next_tokens_of_the_response_alone(tokenizer):
    questions = list(draw_many(random.Random(0), LEVELS))
    rows = [encode(tokenizer, q.text, q.solution) for q in questions]
    ids, labels = collate(rows, tokenizer.pad_token_id)
    assert ids.shape == labels.shape == (len(rows), max(len(p) + len(r) for p, r in rows))
    for q, (prompt, response), row, target in zip(questions, rows, ids, labels, strict=True):
        assert response[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(response[:-1]) == q.solution
        assert row.tolist()[: len(prompt) + len(response)] == prompt + response
        where = (target >= 0).nonzero().flatten()
        # Position i is asked for token i + 1.
        assert torch.equal(target[where], row[where + 1])
        assert target[where].tolist() == response


@pytest.mark.parametrize("shape", [(6, 6), (4, 12), (12, 4)], ids=str)
def test_muon_steps_are_nearly_orthogonal_and_scaled(shape):
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = torch.randn(shape, generator=generator)
    Muon([p], lr=0.1).step()
    size = 0.1 * 0.2 * max(shape) ** 0.5
    singular = torch.linalg.svdvals(-p.detach()) / size
    assert singular.min() > 0.3 and singular.max() < 1.3
    # Downhill.
    assert (p.detach() * p.grad).sum() < 0


def test_muon_treats_matrices_of_a_shape_one_by_one():
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(4, 8, generator=generator) for _ in range(3)]

    def step(chosen):
        parameters = [torch.nn.Parameter(torch.zeros(4, 8)) for _ in chosen]
        for p, g in zip(parameters, chosen, strict=True):
            p.grad = g.clone()
        Muon(parameters, lr=0.1).step()
        return [p.detach() for p in parameters]

    together = step(gradients)
    alone = [step([g])[0] for g in gradients]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b)


def run(tokenizer, seed, iterations):
    model = build_model(tokenizer, seed=1)
    return pretrain(model, tokenizer, iterations=iterations, seed=seed), model


def test_the_loss_falls(tokenizer, capsys):
    losses, model = run(tokenizer, seed=1, iterations=12)
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert not model.training
    assert "pre-training 12/12" in capsys.readouterr().out


def test_the_seed_decides(tokenizer):
    (losses, model), (again, twin), (others, _) = (run(tokenizer, seed, iterations=2) for seed in (1, 1, 2))
    assert losses == again != others
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_held_out_questions_are_excluded(tokenizer, monkeypatch):
    held_out = {q.text for q in draw_many(random.Random(0), [1] * 100)}
    seen = []
    monkeypatch.setattr(module, "encode", lambda t, q, r: seen.append(q) or encode(t, q, r))
    pretrain(build_model(tokenizer, seed=1), tokenizer, iterations=4, seed=1, exclude=held_out)
    assert len(seen) >= 4 * 32
    assert not held_out & set(seen)
    # Without the exclusion this seed does draw some.
    seen.clear()
    pretrain(build_model(tokenizer, seed=1), tokenizer, iterations=4, seed=1)
    assert held_out & set(seen)
