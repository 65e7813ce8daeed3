"""Take DisCO updates through verl's real training worker and engine, and compare with the executable definition.

Run by test_worker.py under torchrun, on gloo ranks without Ray:

    torchrun --nproc-per-node 2 tests/recipe/disco/harness.py SPECS.json RESULTS.jsonl

SPECS: [{"name": ..., "model": DIR, "engine": {...}, "cases": [{...}, ...]}, ...], one engine after another. Rank 0
adds a JSON line per case with ``error``, |theta - theta_ref| / |theta_ref - theta_0| over all parameters after the
case's updates, and ``parameters``, the same relative to |theta_ref|. The reference is float64: the Hugging Face model,
``disco_loss`` on each mini-batch in one piece (for ``measure=lagged`` the loss written out below), plain SGD.
"""

import json
import math
import sys
import warnings

import torch

warnings.filterwarnings("ignore")

VOCABULARY, LEARNING_RATE = 64, 0.2


def make_model(folder: str, experts: int = 0) -> None:
    """A tiny Qwen3 with a tokenizer; weights large enough that the policy is far from uniform.

    Args:
        experts: of the mixture in each layer, of which a token has 2; 0 makes a dense model.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t1", unk_token="t3")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    mixture = dict(num_experts=experts, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "qwen3_moe" if experts else "qwen3",
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            **(mixture if experts else {}),
        )
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4.0)
    model.save_pretrained(folder)


def make_rows(mixed: float | None = None) -> list[dict]:
    """Responses to 8 questions: mixed groups of several sizes, all-positive, all-negative, single, and a masked one.

    Args:
        mixed: share of 10 other questions, of 4 responses each, with right and wrong ones.
    """
    g = torch.Generator().manual_seed(0)

    def tokens(low, high):
        return torch.randint(4, VOCABULARY, (int(torch.randint(low, high, (1,), generator=g)),), generator=g)

    rewards = [[1, 0, 0, 0], [1, 1, 0, 0, 1, 0], [0, 1], [1, 1, 1], [0, 0, 0, 0], [1], [1, 0, 1, 0, 0, 0, 0], [0, 1, 0]]
    if mixed is not None:
        rewards = [[1, 0, 0, 1] if 3 * q % 10 < round(10 * mixed) else [q % 2] * 4 for q in range(10)]
    rows = []
    for q, labels in enumerate(rewards):
        prompt = tokens(3, 9)
        for label in labels:
            response = tokens(2, 15)
            rows.append(dict(uid=f"q{q}", prompt=prompt, response=response, reward=float(label)))
            rows[-1]["mask"] = torch.ones(len(response), dtype=torch.long)
    # Tokens of a tool do not count, and a response may be masked as a whole.
    rows[1]["mask"][1:-1:3] = 0
    rows[8]["mask"][:] = 0
    return rows


def in_sessions(rows: list[dict], sessions: int | None) -> None:
    """Number the response of each row; with ``sessions`` each response but the first has 1, 2 or 3 parts.

    A part is a row of its own, with the response's reward; the next part goes on from another prompt.
    """
    for i, r in enumerate(rows):
        r["session"] = i
    if not sessions:
        return
    for r in [r for r in rows if len(r["response"]) > 5][1:]:
        for k in range(r["session"] % 3):
            part = {n: v[2 * k : 2 * k + 3] if n in ("response", "mask") else v for n, v in r.items()}
            part["prompt"] = torch.cat([r["prompt"], r["response"][: k + 1]])
            rows.insert((5 * r["session"] + 7 * k) % len(rows), part)


def as_responses(rows: list[dict], **tensors: torch.Tensor) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """A row per session, and its parts' tokens one after another: (responses, tokens) for each (rows, tokens)."""
    parts: dict[int, list[int]] = {}
    for i, r in enumerate(rows):
        parts.setdefault(r["session"], []).append(i)
    lengths = [len(r["response"]) for r in rows]

    def joined(x: torch.Tensor) -> torch.Tensor:
        whole = [torch.cat([x[i, : lengths[i]] for i in of]) for of in parts.values()]
        return torch.nn.utils.rnn.pad_sequence(whole, batch_first=True)

    return [rows[of[0]] for of in parts.values()], {name: joined(x) for name, x in tensors.items()}


def mixed_questions(rows: list[dict]) -> set[str]:
    """The questions with different rewards of responses that have a token."""
    found = [uid for uid, _ in {(r["uid"], r["reward"]) for r in rows if r["mask"].any()}]
    return {uid for uid in found if found.count(uid) > 1}


def weights_of_questions(rate: list[float], case: dict) -> list[float]:
    """How much each mixed question counts, by its pass rate."""
    kind = case.get("questions") or ("failure_rate" if case["objective"] == "maxrl" else "uniform")
    if kind == "dgpo":
        e = [math.exp(-p / 2) for p in rate]
        return [len(e) * x / sum(e) for x in e]
    return [{"uniform": 1.0, "failure_rate": 1 - p}[kind] for p in rate]


def settings_of(case: dict):
    from recipe.disco.settings import DiscoConfig

    return DiscoConfig(**{n: case[n] for n in DiscoConfig.__dataclass_fields__ if n in case})


class Reference:
    """The Hugging Face model in float64 with plain SGD on the executable definition.

    Args:
        folder: of the model.
        lora_rank: of adapters; then only these are trained, from ``initial``.
        initial: all parameters by name, where there are adapters.
    """

    def __init__(self, folder: str, lora_rank: int = 0, initial: dict[str, torch.Tensor] | None = None):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
        )
        if lora_rank:
            from peft import LoraConfig, get_peft_model

            adapters = LoraConfig(r=lora_rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
            self.model = get_peft_model(self.model, adapters)
            with torch.no_grad():
                for name, p in self.model.named_parameters():
                    p.copy_(initial[name])
        self.previous_kl = 0.0
        self.initial = {n: p.detach().clone() for n, p in self.model.named_parameters()}

    def log_probs(self, rows: list[dict], temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the responses' tokens and the entropies there, (rows, tokens) each."""
        out = []
        for r in rows:
            ids = torch.cat([r["prompt"], r["response"]])[None]
            every = torch.log_softmax(self.model(ids).logits[0, :-1] / temperature, -1)[len(r["prompt"]) - 1 :]
            out.append((every.gather(-1, r["response"][:, None])[:, 0], -(every.exp() * every).sum(-1)))
        return tuple(torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for x in zip(*out, strict=True))

    def lagged_loss(self, rows, log_prob, old, mask, case) -> tuple[torch.Tensor, dict]:
        """log-L with the negatives' weights at pi_old and the hinge at the previous mini-batch's KL."""
        worth, rate = [], []
        for uid in {r["uid"] for r in rows}:
            sides = {0.0: [], 1.0: []}
            for i, r in enumerate(rows):
                if r["uid"] == uid and r["mask"].any():
                    length = mask[i].sum()
                    sides[r["reward"]].append(
                        ((log_prob[i] * mask[i]).sum() / length, (old[i] * mask[i]).sum() / length)
                    )
            if sides[0.0] and sides[1.0]:
                now, then = (torch.stack(x) for x in zip(*sides[0.0], strict=True))
                share = torch.softmax(then / case["tau"], 0) if case["objective"] == "disco" else 1 / len(now)
                worth.append(torch.stack([s for s, _ in sides[1.0]]).mean() - (share * now).sum())
                rate.append(len(sides[1.0]) / (len(sides[0.0]) + len(sides[1.0])))
        total = sum(c * j for c, j in zip(weights_of_questions(rate, case), worth, strict=True))
        coefficient = case["beta"] * max(self.previous_kl - case["delta"], 0.0)
        seen = mask
        if case["skip"] and not coefficient:
            # Of the questions that are trained on
            seen = mask * torch.tensor([float(r["uid"] in mixed_questions(rows)) for r in rows])[:, None]
        if not seen.any():
            return 0 * log_prob.sum(), {"kl": self.previous_kl, "coefficient": coefficient}
        kl = ((old - log_prob) * seen).sum() / seen.sum()
        self.previous_kl = kl.item()
        loss = -total / len({r["uid"] for r in rows}) + coefficient * kl
        return loss, {"kl": kl.item(), "coefficient": coefficient}

    def step(self, rows: list[dict], case: dict) -> dict:
        from recipe.disco import disco_loss

        pad = torch.nn.utils.rnn.pad_sequence
        log_prob, entropy = self.log_probs(rows, case["temperature"])
        names = ("old", "mask", "ref", "rho")
        columns = {name: pad([r[name].double() for r in rows], batch_first=True) for name in names}
        rows, found = as_responses(rows, log_prob=log_prob, entropy=entropy, **columns)
        log_prob, entropy, old, mask = (found[name] for name in ("log_prob", "entropy", "old", "mask"))
        if case["measure"] == "lagged":
            loss, metrics = self.lagged_loss(rows, log_prob, old, mask, case)
        else:
            loss, metrics = disco_loss(
                log_prob,
                old,
                mask,
                torch.tensor([r["reward"] for r in rows]),
                [r["uid"] for r in rows],
                ref_log_prob=found["ref"],
                rollout_is_weights=found["rho"] if case["correction"] else None,
                progress=PROGRESS,
                **settings_of(case).chosen(),
            )
        loss = loss - case["entropy_coeff"] * (entropy * mask).sum() / mask.sum()
        self.model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in self.model.parameters():
                if p.grad is not None:
                    p -= LEARNING_RATE * p.grad
        return metrics


def to_batch(rows: list[dict], plan, ranks: int, rank: int, case: dict):
    """This rank's rows as verl's V1 trainer hands them to a worker: jagged tensors, padding rows of its making."""
    from dataclasses import asdict

    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu

    from verl_ext.training.rows import BatchFacts

    padding = dict(uid="pad", prompt=torch.ones(7, dtype=torch.long), response=torch.ones(1, dtype=torch.long))
    padding |= dict(mask=torch.zeros(1, dtype=torch.long), old=torch.zeros(1), ref=torch.zeros(1), reward=0.0)
    padding |= dict(rho=torch.zeros(1))
    everything = rows + [padding] * plan.num_padding
    share = len(plan.order) // ranks
    mine = plan.order[rank * share : (rank + 1) * share]
    number = {u: i for i, u in enumerate(dict.fromkeys(r["uid"] for r in rows))} | {"pad": -1}
    selected = [everything[i] for i in mine]

    def jagged(values):
        return torch.nested.as_nested_tensor(values, layout=torch.jagged)

    ids = [torch.cat([r["prompt"], r["response"]]) for r in selected]
    uids = [r["uid"] for r in rows]
    data = TensorDict(
        dict(
            input_ids=jagged(ids),
            position_ids=jagged([torch.arange(len(i)) for i in ids]),
            prompts=jagged([r["prompt"] for r in selected]),
            responses=jagged([r["response"] for r in selected]),
            response_mask=jagged([r["mask"] for r in selected]),
            loss_mask=jagged([r["mask"] for r in selected]),
            old_log_probs=jagged([r["old"].float() for r in selected]),
            ref_log_prob=jagged([r["ref"].float() for r in selected]),
            group_id=torch.tensor([number[r["uid"]] for r in selected]),
            group_size=torch.tensor([uids.count(r["uid"]) for r in selected]),
            session_id=torch.tensor([r.get("session", i) for i, r in zip(mine, selected, strict=True)]),
            sequence_reward=torch.tensor([r["reward"] for r in selected]),
            sample_index=torch.tensor(mine),
            mini_batch_id=torch.tensor([plan.mini_batch[rank * share + i] for i in range(share)]),
            **({"rollout_is_weights": jagged([r["rho"].float() for r in selected])} if case["correction"] else {}),
        ),
        batch_size=[share],
    )
    tu.assign_non_tensor(
        data,
        temperature=case["temperature"],
        calculate_entropy=case["entropy_coeff"] != 0,
        global_batch_size=len(plan.order),
        mini_batch_size=len(plan.order),
        epochs=case["epochs"],
        seed=3,
        dataloader_kwargs={"shuffle": case["shuffle_mini_batches"]},
        **asdict(
            BatchFacts(
                old_log_probs_fresh=case["fresh"], entropy_logged=True, skip_rows=case["skip"], progress=PROGRESS
            )
        ),
    )
    return data


def build_worker(folder: str, engine: dict):
    from recipe.disco.worker import DiscoTrainingWorker

    worker = DiscoTrainingWorker(
        megatron_config(folder, engine) if "megatron" in engine else fsdp_config(folder, engine)
    )
    if "megatron" in engine:
        from megatron_on_cpu import seed

        seed()
    worker.reset()
    return worker


def megatron_config(folder: str, engine: dict):
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import HFModelConfig, McoreEngineConfig, McoreOptimizerConfig, TrainingWorkerConfig

    split, remove_padding = engine["megatron"], engine.get("remove_padding", False)
    config = McoreEngineConfig(
        **split,
        sequence_parallel=split.get("tensor_model_parallel_size", 1) > 1,
        vanilla_mbridge=True,
        use_distributed_optimizer=False,
        use_remove_padding=remove_padding,
        max_token_len_per_gpu=64,
        infer_max_token_len_per_gpu=96,
        micro_batch_size_per_gpu=4,
        infer_micro_batch_size_per_gpu=4,
        override_transformer_config=dict(
            use_cpu_initialization=True,
            masked_softmax_fusion=False,
            bias_activation_fusion=False,
            gradient_accumulation_fusion=False,
            attention_backend="unfused",
            attention_softmax_in_fp32=True,
        ),
    )
    # verl's own field allows half precision alone.
    object.__setattr__(config, "dtype", "float32")
    return TrainingWorkerConfig(
        model_type="language_model",
        model_config=HFModelConfig(path=folder, use_remove_padding=remove_padding, enable_gradient_checkpointing=False),
        engine_config=config,
        optimizer_config=McoreOptimizerConfig(
            optimizer="sgd",
            override_optimizer_config={"sgd_momentum": 0.0},
            lr=LEARNING_RATE,
            lr_decay_style="constant",
            lr_warmup_steps=0,
            total_training_steps=100,
            clip_grad=1e9,
            weight_decay=0.0,
        ),
        checkpoint_config=CheckpointConfig(),
    )


def fsdp_config(folder: str, engine: dict):
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig

    remove_padding, ulysses = engine.get("remove_padding", False), engine.get("ulysses", 1)
    attention, strategy = "sdpa" if remove_padding else "eager", engine.get("strategy", "fsdp2")
    if ulysses > 1:
        import verl.workers.engine.fsdp.transformer_impl  # noqa: F401  (first: our engines register upon its import)
        from varlen_attention import install

        from verl_ext.cpu import engine as cpu_engine

        attention = install()
        # The platform refuses Ulysses for an attention that verl does not parallelise; this one lies below its patch.
        check = cpu_engine.settings_for_cpu
        cpu_engine.settings_for_cpu = lambda config, _: check(config, "flash_attention_2")
    if strategy == "fsdp":
        allow_fsdp1()
    return TrainingWorkerConfig(
        model_type="language_model",
        model_config=HFModelConfig(
            path=folder,
            use_remove_padding=remove_padding,
            enable_gradient_checkpointing=engine.get("gradient_checkpointing", False),
            lora_rank=engine.get("lora_rank", 0),
            override_config={"attn_implementation": attention},
        ),
        engine_config=FSDPEngineConfig(
            strategy=strategy,
            ulysses_sequence_parallel_size=ulysses,
            fsdp_size=engine.get("fsdp_size", -1),
            use_torch_compile=False,
            use_orig_params=True,
            max_token_len_per_gpu=64,
            infer_max_token_len_per_gpu=96,
            micro_batch_size_per_gpu=4,
            infer_micro_batch_size_per_gpu=4,
            mixed_precision=dict(param_dtype="fp32", reduce_dtype="fp32", buffer_dtype="fp32"),
        ),
        optimizer_config=FSDPOptimizerConfig(
            optimizer="SGD",
            lr=LEARNING_RATE,
            lr_scheduler_type="constant",
            lr_warmup_steps=0,
            total_training_steps=100,
            clip_grad=1e9,
            weight_decay=0.0,
        ),
        checkpoint_config=CheckpointConfig(),
    )


def allow_fsdp1() -> None:
    """FSDP1 wants its states on an accelerator before rank 0 sends them to the others; gloo sends a CPU's as well."""
    import torch.distributed.fsdp._init_utils as fsdp1
    import verl.workers.engine.fsdp.transformer_impl  # noqa: F401  (first: our engines register upon its import)

    from verl_ext.cpu import engine as cpu_engine

    fsdp1._check_module_states_for_sync_module_states = lambda states: None
    check = cpu_engine.settings_for_cpu
    cpu_engine.settings_for_cpu = lambda c, attention: c if c.strategy == "fsdp" else check(c, attention)


def full(p: torch.Tensor) -> torch.Tensor:
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().double()


def parameters(engine) -> list[torch.Tensor]:
    """This rank's, as the optimizer has them."""
    chunks = engine.module if isinstance(engine.module, list) else [engine.module]
    return [p for chunk in chunks for p in chunk.parameters()]


def whole_parameters(engine) -> dict[str, torch.Tensor]:
    """All of the model's, whole, in float64, under the Hugging Face model's names."""
    if isinstance(engine.module, list):
        return {name: p.detach().double().clone() for name, p in engine.bridge.export_weights(engine.module)}
    if engine.engine_config.strategy == "fsdp":
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(engine.module, writeback=False):
            return {
                n.replace("_fsdp_wrapped_module.", ""): p.detach().double().clone()
                for n, p in engine.module.named_parameters()
            }
    return {n.replace("_orig_mod.", ""): full(p) for n, p in engine.module.named_parameters()}


PROGRESS = 0.4
"""The share of the training before this step."""

DEFAULTS = dict(
    objective="disco",
    score="log_l",
    tau=0.5,
    constraint="squared_hinge",
    delta=0.01,
    beta=20.0,
    temperature=0.8,
    groups_per_mini_batch=8,
    micro=4,
    infer_micro=4,
    dynamic=False,
    order_seed=None,
    epochs=1,
    shuffle_mini_batches=False,
    fresh=False,
    old_noise=0.1,
    mixed=None,
    sessions=False,
    skip=True,
    measure="exact",
    pairs="threshold",
    entropy_coeff=0.0,
    correction=False,
)


def run_case(worker, spec: dict, case: dict) -> dict:
    from verl.utils import tensordict_utils as tu

    from verl_ext.training.grouping import deal
    from verl_ext.training.skipping import teaching

    case = DEFAULTS | case
    reference = Reference(spec["model"], spec["engine"].get("lora_rank", 0), worker.whole_initial)
    rows = make_rows(case["mixed"])
    if case["pairs"] == "graded":
        # Three levels, also in questions that had no right response.
        for r in rows[::3]:
            r["reward"] /= 2 if r["reward"] else 1
        for r in rows[1::4]:
            r["reward"] = r["reward"] or 0.25
    in_sessions(rows, case["sessions"])
    noise, reference_noise, weight_noise = (torch.Generator().manual_seed(seed) for seed in (5, 6, 7))
    with torch.no_grad():
        current, _ = reference.log_probs(rows, case["temperature"])
    for r, lp in zip(rows, current, strict=True):
        n = len(r["response"])
        # Above the current policy on average, so that the KL is well over delta; none for a fresh rollout.
        r["old"] = lp[:n] + case["old_noise"] * (0.5 + torch.randn(n, generator=noise).double())
        r["old"] = r["old"].float().double()
        r["ref"] = (r["old"] + 0.3 * torch.randn(n, generator=reference_noise).double()).float().double()
        # As verl makes them: ratios of probabilities, cut at 2.
        r["rho"] = (0.5 * torch.randn(n, generator=weight_noise).double()).exp().clamp(max=2).float().double()
    if case["order_seed"] is not None:
        shuffle = torch.randperm(len(rows), generator=torch.Generator().manual_seed(case["order_seed"]))
        rows = [rows[i] for i in shuffle.tolist()]

    engine = worker.engine
    ranks, rank = engine.get_data_parallel_size(), engine.get_data_parallel_rank()
    plan = deal(
        [r["uid"] for r in rows],
        [len(r["prompt"]) + len(r["response"]) for r in rows],
        groups_per_mini_batch=case["groups_per_mini_batch"],
        ranks=ranks,
        micro_batches=() if case["dynamic"] else (case["micro"], case["infer_micro"]),
        padding_length=8,
        trained=teaching([r["uid"] for r in rows], [r["reward"] for r in rows]) if case["skip"] else None,
    )
    worker.configure(settings_of(case), entropy_coeff=case["entropy_coeff"])
    for name, value in (
        ("use_dynamic_bsz", case["dynamic"]),
        ("micro_batch_size_per_gpu", case["micro"]),
        ("infer_micro_batch_size_per_gpu", case["infer_micro"]),
    ):
        object.__setattr__(worker.engine_config, name, value)
    with torch.no_grad():
        for p, start in zip(parameters(engine), worker.initial, strict=True):
            p.copy_(start)

    output = worker.train_mini_batch(to_batch(rows, plan, ranks, rank, case))

    order = list(range(len(plan.partitions))) * case["epochs"]
    if case["shuffle_mini_batches"]:
        g = torch.Generator().manual_seed(3)
        order = [i for _ in range(case["epochs"]) for i in torch.randperm(len(plan.partitions), generator=g).tolist()]
    mini_batches = [[rows[i] for part in parts for i in part if i < len(rows)] for parts in plan.partitions]
    logged = [reference.step(mini_batches[m], case) for m in order]
    difference = update = size = 0.0
    ours = whole_parameters(engine)
    assert set(ours) == set(reference.initial)
    for name, p in reference.model.named_parameters():
        difference += float((ours[name] - p.detach()).square().sum())
        update += float((p.detach() - reference.initial[name]).square().sum())
        size += float(p.detach().square().sum())
    result = {"error": math.sqrt(difference / update) if update else difference, "moved": update > 0}
    result["parameters"] = math.sqrt(difference / size)
    # Shares of the rows, with padding, of a mini-batch that have a token, and that belong to mixed questions.
    count = len(plan.order) / len(plan.partitions)
    kinds = [([r for r in m if r["mask"].any()], mixed_questions(m)) for m in mini_batches]
    result["shares"] = [
        (len(kinds[m][0]) / count, sum(r["uid"] in kinds[m][1] for r in kinds[m][0]) / count) for m in order
    ]
    if output is not None:
        ours = tu.get(output, "metrics")
        result["metrics"] = {k.removeprefix("disco/"): v for k, v in ours.items() if k.startswith("disco/")}
        # A mean over nothing, as over no mixed group, is left out on both sides.
        names = {k for m in logged for k in m}
        result["reference"] = {k: [m[k] for m in logged if k in m] for k in names}
    return result


def run_engine(spec: dict) -> None:
    worker = build_worker(spec["model"], spec["engine"])
    worker.initial = [p.detach().clone() for p in parameters(worker.engine)]
    worker.whole_initial = whole_parameters(worker.engine)
    for case in spec["cases"]:
        try:
            result = run_case(worker, spec, case)
        except ValueError as e:
            result = {"refused": str(e)}
        if worker.engine.is_mp_src_rank_with_outputs() and worker.engine.get_data_parallel_rank() == 0:
            # Not printed: the output is the other ranks', too, and their lines get in between.
            with open(sys.argv[2], "a") as f:
                f.write(json.dumps({"name": spec["name"], "case": DEFAULTS | case, **result}) + "\n")


def main() -> None:
    with open(sys.argv[1]) as f:
        specs = json.load(f)
    megatron = any("megatron" in spec["engine"] for spec in specs)
    if megatron:
        import megatron_on_cpu

        megatron_on_cpu.before_verl()
    import verl  # noqa: F401  (activates the plugin)

    if megatron:
        megatron_on_cpu.install()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for spec in specs:
        run_engine(spec)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
