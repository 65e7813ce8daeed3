"""A LoRA run's export is the trained model: by the formula, from two ranks' shards, without the code that exports."""

import json
import os
import subprocess
import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 8, 24
SCORE = "val-core/toy/acc/mean@1"


def test_the_adapter_of_a_lora_run_is_in_its_export(main_ppo, toy, tmp_path):
    run = main_ppo(
        "algorithm=disco",
        f"actor_rollout_ref.model.lora_rank={RANK}",
        f"actor_rollout_ref.model.lora_alpha={ALPHA}",
        "actor_rollout_ref.model.lora.merge=True",
        "actor_rollout_ref.actor.fsdp_config.fsdp_size=2",
        # So that B, zero at first, is large after two steps.
        "actor_rollout_ref.actor.optim.lr=1e-2",
        "trainer.save_freq=2",
        "trainer.test_freq=2",
        ranks=2,
    )
    assert run.returncode == 0, run.output[-5000:]
    # Half-written, and newer.
    (run.folder / "global_step_3/actor").mkdir(parents=True)
    (run.folder / "global_step_tmp/actor").mkdir(parents=True)
    out = tmp_path / "exported"
    done = subprocess.run(
        [sys.executable, "-m", "verl_ext.export", str(run.folder), "--out", str(out)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr

    shards = [torch.load(f, weights_only=True) for f in sorted(run.folder.glob("global_step_2/actor/model_*.pt"))]
    assert len(shards) == 2
    state = {n: torch.cat([shard[n].to_local() for shard in shards]) for n in shards[0]}
    assert max(len(shard["base_model.model.model.embed_tokens.weight"].to_local()) for shard in shards) < 278

    before, after = load_file(toy / "model/model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    updates = {}
    for name, tensor in after.items():
        module = name.removesuffix(".weight")
        assert tensor.dtype == torch.float32
        if not module.endswith(TARGETS):
            assert torch.equal(tensor, before[name]), name
            continue
        a, b = (state[f"base_model.model.{module}.lora_{x}.default.weight"] for x in "AB")
        updates[module] = ALPHA / RANK * b @ a
        assert float(updates[module].abs().max()) > 1e-3, name
        torch.testing.assert_close(tensor, before[name] + updates[module], rtol=0, atol=1e-6)
    assert len(updates) == 2 * len(TARGETS)

    # The adapter beside the base model's weights, not in them.
    tokenizer = AutoTokenizer.from_pretrained(out)
    base, exported = (AutoModelForCausalLM.from_pretrained(folder) for folder in (toy / "model", out))
    ids = torch.tensor([tokenizer("12+34=46, 5*(6-7)=-5").input_ids])
    with torch.no_grad():
        without, merged = (m(input_ids=ids).logits.log_softmax(-1) for m in (base, exported))
        for name, module in base.named_modules():
            if name in updates:
                module.register_forward_hook(lambda m, x, y, w=updates[name]: y + x[0] @ w.T)
        beside = base(input_ids=ids).logits.log_softmax(-1)
    error, effect = float((merged - beside).abs().max()), float((without - beside).abs().max())
    print(f"log-probabilities: error {error:.2g}, effect of the adapter {effect:.2g}")
    assert error < 1e-4 and effect > 0.05

    card = (out / "README.md").read_text()
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    ((step, share),) = ((r["step"], r[SCORE]) for r in rows if SCORE in r)
    assert step == 2 and f"| toy |  | {100 * share:.1f} |" in card
    assert f"rank {RANK}, alpha {ALPHA}" in card and "14 of 24 tensors differ" in card
    assert "float32, as in the checkpoint" in card and "without the adapter they change by up to" in card
