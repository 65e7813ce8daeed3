"""The exported weights against the formula W + alpha/r B A and the checkpoint's tensors, and the checks' refusals.

The checkpoints are written as verl's FSDP engine writes them: per rank one dictionary of DTensors.
"""

import json
import subprocess

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from verl_ext.export import checks as export_checks
from verl_ext.export import model as trained_model
from verl_ext.export.checks import LogProbs
from verl_ext.export.model import export_model
from verl_ext.export.push import plan
from verl_ext.runs.checkpoints import Checkpoint, ExportError, Shards
from verl_ext.tasks.arithmetic.model import build_tokenizer

SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    vocab_size=278,
    max_position_embeddings=128,
)
RANK, ALPHA = 4, 10
NORM = "model.norm.weight"
TARGETS = ("q_proj", "v_proj", "down_proj")


def tiny(seed: int, tied: bool = True, dtype: torch.dtype = torch.float32) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=tied, initializer_range=0.2))
    model.config.architectures = ["Qwen3ForCausalLM"]
    for name, tensor in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(tensor, 0.5, 1.5)
    return model.to(dtype)


def write_shards(actor, state, mesh=(2,), names=("fsdp",)):
    """``state`` as the ranks of a mesh of FSDP save it: by rows over the last dimension, replicated over the other."""
    placements = [Replicate()] * (len(mesh) - 1) + [Shard(0)]
    world = torch.Size(mesh).numel()
    for rank in range(world):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            device_mesh = init_device_mesh("cpu", mesh, mesh_dim_names=names)
            shard = {}
            for name, tensor in state.items():
                rows = [*tensor.chunk(mesh[-1]), *[tensor[:0]] * mesh[-1]][device_mesh.get_coordinate()[-1]]
                shard[name] = DTensor.from_local(
                    rows.clone(), device_mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
                )
            torch.save(shard, actor / f"model_world_size_{world}_rank_{rank}.pt")
        finally:
            torch.distributed.destroy_process_group()
    (actor / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": world}))


@pytest.fixture
def base(tmp_path):
    """The folder of the model that training started from."""
    tiny(1).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def checkpoint(tmp_path):
    """``checkpoint(state, model, ...)``: a checkpoint of FSDP with these tensors."""

    def write(state, model, **layout):
        actor = tmp_path / "run/global_step_4/actor"
        (actor / "huggingface").mkdir(parents=True)
        model.config.save_pretrained(actor / "huggingface")
        build_tokenizer().save_pretrained(actor / "huggingface")
        (actor / "huggingface/generation_config.json").write_text('{"eos_token_id": 275, "temperature": 0.6}')
        write_shards(actor, state, **layout)
        return Checkpoint(4, actor, megatron=False)

    return write


def with_adapter(model, seed: int = 5):
    """The state of ``model`` under an adapter, by verl's names, and the weights with it merged, by the formula."""
    torch.manual_seed(seed)
    state, merged = {}, {}
    for name, tensor in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        merged[name] = tensor
        if kind == "weight" and module.endswith(TARGETS):
            a, b = torch.randn(RANK, tensor.shape[1]) * 0.2, torch.randn(tensor.shape[0], RANK) * 0.2
            a, b = a.to(tensor.dtype), b.to(tensor.dtype)
            state[f"base_model.model.{module}.base_layer.weight"] = tensor
            state[f"base_model.model.{module}.lora_A.default.weight"] = a
            state[f"base_model.model.{module}.lora_B.default.weight"] = b
            merged[name] = (tensor.double() + ALPHA / RANK * b.double() @ a.double()).float()
        else:
            state[f"base_model.model.{name}"] = tensor
    return state, merged


def settings(base, **more):
    found = {"path": str(base), "lora_rank": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGETS)} | more
    return {f"actor_rollout_ref.model.{name}": value for name, value in found.items()}


def run(checkpoint, out, settings, dtype=None) -> tuple[dict[str, torch.Tensor], str]:
    """The exported tensors and the card's sentences."""
    out.mkdir()
    told = export_model(checkpoint, out, settings, dtype, trust_remote_code=False)
    assert not (out / "scratch").exists()
    return load_file(out / "model.safetensors"), "\n".join(told)


@pytest.mark.parametrize(
    "layout",
    [dict(mesh=(1,)), dict(mesh=(2,)), dict(mesh=(3,)), dict(mesh=(2, 2), names=("ddp", "fsdp"))],
    ids=["one rank", "two ranks", "uneven", "hybrid"],
)
def test_an_adapter_is_merged_and_nothing_else_changes(base, checkpoint, tmp_path, layout):
    state, merged = with_adapter(tiny(1))
    found, told = run(checkpoint(state, tiny(1), **layout), tmp_path / "out", settings(base))
    assert found.keys() == merged.keys() - {"lm_head.weight"}
    before = load_file(base / "model.safetensors")
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=1e-6)
        assert torch.equal(tensor, before[name]) != name.endswith(tuple(f"{t}.weight" for t in TARGETS)), name
    assert "float32, as in the checkpoint" in told and "rank 4, alpha 10, on down_proj, q_proj, v_proj" in told
    assert "6 of 24 tensors differ" in told and "the adapter changes 6, of which 6 differ" in told
    assert "Log-probabilities of 155 tokens match the checkpoint's within" in told and "Warning" not in told
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation == {"eos_token_id": 275, "temperature": 0.6}


def test_the_adapter_alone_stands_beside_the_merged_weights(base, checkpoint, tmp_path):
    from peft import PeftModel

    state, merged = with_adapter(tiny(1))
    run(checkpoint(state, tiny(1)), tmp_path / "out", settings(base))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out/lora_adapter")
    for name, tensor in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=1e-6)
    config = json.loads((tmp_path / "out/lora_adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (RANK, ALPHA, str(base))
    # A push would send all of it.
    (tmp_path / "out/README.md").touch()
    pushed = plan(tmp_path / "out")
    assert "lora_adapter/adapter_model.safetensors" in pushed.files and pushed.left_out == []


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_full_fine_tune_keeps_each_tensor_and_its_type(base, checkpoint, tmp_path, dtype, tied):
    trained = tiny(2, tied, dtype)
    found, told = run(checkpoint(trained.state_dict(), trained, mesh=(3,)), tmp_path / "out", settings(base))
    expected = trained.state_dict()
    if tied:
        del expected["lm_head.weight"]
    assert found.keys() == expected.keys()
    assert all(t.dtype == dtype and torch.equal(t, expected[n]) for n, t in found.items())
    name = str(dtype).removeprefix("torch.")
    assert told.startswith(f"{name}, as in the checkpoint.") and "24 of 24 tensors differ" in told
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == name and config["tie_word_embeddings"] == tied


def test_shards_are_put_together_as_verls_merger_does_it(checkpoint):
    from verl.model_merger.base_model_merger import ModelMergerConfig
    from verl.model_merger.fsdp_model_merger import FSDPModelMerger

    trained = tiny(2)
    for layout in (dict(mesh=(3,), names=("fsdp",)), dict(mesh=(2, 2), names=("ddp", "fsdp"))):
        actor = checkpoint(trained.state_dict(), trained, **layout).folder
        config = ModelMergerConfig("merge", "fsdp", local_dir=str(actor), hf_model_config_path=actor / "huggingface")
        world, last = torch.Size(layout["mesh"]).numel(), layout["mesh"][-1]
        verls = FSDPModelMerger(config)._load_and_merge_state_dicts(world, last, (last,), layout["names"])
        ours = Shards(actor)
        assert verls.keys() == ours.keys()
        assert all(torch.equal(ours[n].bfloat16(), verls[n]) for n in ours)
        actor.parent.rename(actor.parent.with_name(f"{world} ranks"))


def test_tensors_are_read_only_when_asked_for(checkpoint, monkeypatch):
    shards = Shards(checkpoint(tiny(2).state_dict(), tiny(2)).folder)
    monkeypatch.setattr(Shards, "__getitem__", lambda self, name: pytest.fail(f"{name} was read"))
    assert NORM in shards and "other" not in shards and not {NORM} - shards.keys() and len(shards) == 25
    assert shards.meta(NORM).shape == (32,)


def test_rounding_is_done_on_demand_once_and_named(base, checkpoint, tmp_path):
    state, merged = with_adapter(tiny(1))
    found, told = run(checkpoint(state, tiny(1)), tmp_path / "out", settings(base), torch.bfloat16)
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor, merged[name].bfloat16(), rtol=2**-7, atol=0)
    assert "bfloat16, as requested; the checkpoint has float32." in told


def test_an_adapter_in_half_precision_is_merged_in_float32(base, checkpoint, tmp_path):
    state, merged = with_adapter(tiny(1, dtype=torch.bfloat16))
    found, told = run(checkpoint(state, tiny(1)), tmp_path / "out", settings(base), torch.float32)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, merged[name].float(), rtol=0, atol=1e-6)
    assert "float32, as requested; the checkpoint has bfloat16." in told
    # verl's base is the bfloat16 of a float32 file: where nothing was trained, nothing differs.
    assert "6 of 24 tensors differ" in told and "Warning" not in told


def test_experts_are_written_by_the_hubs_names(checkpoint, tmp_path):
    config = Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1
    )
    torch.manual_seed(1)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "base")
    trained = Qwen3MoeForCausalLM(config)
    trained.config.architectures = ["Qwen3MoeForCausalLM"]
    trained.save_pretrained(tmp_path / "expected")
    found, told = run(checkpoint(trained.state_dict(), trained), tmp_path / "out", settings(tmp_path / "base"))
    expected = load_file(tmp_path / "expected/model.safetensors")
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in found and found.keys() == expected.keys()
    assert all(torch.equal(t, expected[n]) for n, t in found.items())
    assert f"of {len(found)} tensors differ" in told and "within 0," in told


def test_a_checkpoint_of_the_adapter_alone_needs_the_base_model(base, checkpoint, tmp_path):
    state, merged = with_adapter(tiny(1))
    only = checkpoint({n: t for n, t in state.items() if "lora_" in n}, tiny(1))
    found, told = run(only, tmp_path / "out", settings(base))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=1e-6)
    assert "6 of 24 tensors differ" in told
    with pytest.raises(ExportError, match="only an adapter, and actor_rollout_ref.model.path=some/base is not on"):
        run(only, tmp_path / "other", settings("some/base"))


def test_the_scale_of_an_adapter_that_training_started_from_is_its_own(base, checkpoint, tmp_path):
    from peft import LoraConfig

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), use_rslora=True)
    config.save_pretrained(tmp_path / "start")
    state, merged = with_adapter(tiny(1))
    saved = checkpoint(state, tiny(1))
    # What the run's settings say of rank and alpha is not used by verl then.
    given = settings(base, lora_adapter_path=str(tmp_path / "start"), lora_rank=64, lora_alpha=1)
    found, _ = run(saved, tmp_path / "out", given)
    name = "model.layers.1.mlp.down_proj.weight"
    before = load_file(base / "model.safetensors")[name]
    torch.testing.assert_close(found[name] - before, (merged[name] - before) * RANK**0.5, rtol=0, atol=1e-5)
    (tmp_path / "start/adapter_config.json").unlink()
    (tmp_path / "start").rmdir()
    with pytest.raises(ExportError, match="lora_adapter_path=.*start is no folder here"):
        run(saved, tmp_path / "other", given)


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full"])
def test_what_does_not_fit_into_memory_is_exported_all_the_same(base, checkpoint, tmp_path, monkeypatch, adapter):
    state, merged = with_adapter(tiny(1)) if adapter else (tiny(2).state_dict(),) * 2
    monkeypatch.setattr(trained_model, "available_memory", lambda: 2**20 // 10)
    found, told = run(checkpoint(state, tiny(1)), tmp_path / "out", settings(base), torch.float16)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, merged[name].half(), rtol=2**-10, atol=0)
    assert "not compared: the model needs more than the 0.0 GiB of memory that are free" in told
    assert "All 24 tensors in the files equal the checkpoint's in float16" in told
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(trained_model.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ExportError, match="does not fit into the 0.0 GiB of free memory, nor on the disk"):
        run(Checkpoint(4, tmp_path / "run/global_step_4/actor", False), tmp_path / "other", settings(base))


def test_what_trained_nothing_is_refused(base, checkpoint, tmp_path):
    state, _ = with_adapter(tiny(1))
    state = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in state.items()}
    with pytest.raises(ExportError, match="the adapter's 6 B matrices are zero, as before training"):
        run(checkpoint(state, tiny(1)), tmp_path / "out", settings(base))


def test_a_full_fine_tune_that_changed_nothing_is_refused(base, checkpoint, tmp_path):
    with pytest.raises(ExportError, match="no trained tensor differs from `.*base`"):
        run(checkpoint(tiny(1).state_dict(), tiny(1)), tmp_path / "out", settings(base))


@pytest.mark.parametrize("base_here", [True, False])
def test_a_dropped_adapter_is_noticed(base, checkpoint, tmp_path, monkeypatch, base_here):
    """As verl's merger drops it: with the base model at hand and without."""
    from peft import PeftModel

    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    state, _ = with_adapter(tiny(1))
    with pytest.raises(ExportError, match="no trained tensor differs from"):
        run(checkpoint(state, tiny(1)), tmp_path / "out", settings(base if base_here else "some/base"))


def test_an_adapter_at_the_wrong_scale_is_noticed(base, checkpoint, tmp_path, monkeypatch):
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    def halved(self):
        for module in self.modules():
            if isinstance(module, LoraLayer):
                module.scaling["default"] *= 0.5
        return self.base_model.merge_and_unload()

    monkeypatch.setattr(PeftModel, "merge_and_unload", halved, raising=False)
    state, _ = with_adapter(tiny(1))
    with pytest.raises(ExportError, match="log-probabilities differ by .* at most 0.001 was expected in float32"):
        run(checkpoint(state, tiny(1)), tmp_path / "out", settings(base))


def test_files_that_are_not_what_was_merged_are_noticed(base, tmp_path):
    model = tiny(2)
    model.save_pretrained(tmp_path / "out")
    assert "24 tensors" in export_checks.compare_files(tmp_path / "out", model, torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-6
    with pytest.raises(ExportError, match="model.layers.1.mlp.up_proj.weight in the files differs"):
        export_checks.compare_files(tmp_path / "out", model, torch.float32)


def test_rounding_away_what_training_did_is_a_warning():
    values = torch.tensor([-1.0, -2.0])
    rounded = [
        export_checks.compare_log_probs(LogProbs(values, e), values + 0.01, torch.bfloat16) for e in (0.002, 0.02)
    ]
    assert rounded[0][-1].startswith("Warning: rounding to bfloat16 changes them by more than training did")
    assert len(rounded[1]) == 1
    for found in (values + 0.6, values * float("nan")):
        with pytest.raises(ExportError, match="differ by"):
            export_checks.compare_log_probs(LogProbs(values), found, torch.bfloat16)


def test_a_model_that_needs_an_accelerator_is_compared_by_its_tensors(base, checkpoint, tmp_path, monkeypatch):
    def fail(self, *args, **kwargs):
        raise RuntimeError("no kernel for\nthe CPU")

    monkeypatch.setattr(Qwen3ForCausalLM, "forward", fail)
    _, told = run(checkpoint(tiny(2).state_dict(), tiny(2)), tmp_path / "out", settings(base))
    assert "not compared: the model does not run on a CPU (RuntimeError: no kernel for the CPU)." in told
    assert "All 24 tensors in the files equal the checkpoint's" in told


def test_memory_that_is_needed_is_compared_with_what_is_free(tmp_path, monkeypatch):
    assert 2**20 < trained_model.available_memory() <= psutil.virtual_memory().total
    monkeypatch.setattr(trained_model, "available_memory", lambda: 8 * 10**6)
    assert trained_model.Scratch.where_needed(tmp_path / "scratch", 10**6, torch.float32) is None
    assert trained_model.Scratch.where_needed(tmp_path / "scratch", 10**6 + 1, torch.float32).folder.is_dir()


def test_without_the_base_model_the_card_says_so(checkpoint, tmp_path):
    _, told = run(checkpoint(tiny(2).state_dict(), tiny(2)), tmp_path / "out", settings("some/base"))
    assert "Not compared with the base model `some/base`: it is not on this machine." in told
    assert "Log-probabilities of 155 tokens match the checkpoint's within 0," in told


def test_without_the_base_model_an_adapter_is_compared_with_the_checkpoints_own(checkpoint, tmp_path):
    state, _ = with_adapter(tiny(1))
    _, told = run(checkpoint(state, tiny(1)), tmp_path / "out", settings("some/base"))
    assert "6 of 24 tensors differ from the frozen weights in the checkpoint" in told


def test_another_base_model_than_the_trained_one_is_a_warning(base, checkpoint, tmp_path):
    state, _ = with_adapter(tiny(3))
    _, told = run(checkpoint(state, tiny(3)), tmp_path / "out", settings(base))
    assert "Warning: model.embed_tokens.weight" in told and "is not where training started" in told


def test_a_damaged_base_model_is_named_and_no_obstacle(base, checkpoint, tmp_path):
    (base / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    _, told = run(checkpoint(tiny(2).state_dict(), tiny(2)), tmp_path / "out", settings(base))
    assert "Not compared with the base model" in told and "model.safetensors cannot be read" in told


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_one_of_two_tied_tables_unties_them(base, checkpoint, tmp_path, target):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", target], init_lora_weights=False)
    model = get_peft_model(tiny(1), config)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    found, told = run(checkpoint(state, tiny(1)), tmp_path / "out", settings(base, target_modules=["q_proj", target]))
    embed, head = found["model.embed_tokens.weight"], found["lm_head.weight"]
    before = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(head, before) != (target == "lm_head") and torch.equal(embed, before) == (target == "lm_head")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_an_adapter_on_bare_parameters_is_merged(checkpoint, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    torch.manual_seed(1)
    start = Qwen3MoeForCausalLM(config)
    start.config.architectures = ["Qwen3MoeForCausalLM"]
    start.save_pretrained(tmp_path / "base")
    targets = dict(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    model = get_peft_model(start, LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights=False, **targets))
    saved = checkpoint({n: t.clone() for n, t in model.state_dict().items()}, start)
    _, told = run(saved, tmp_path / "out", settings(tmp_path / "base", **targets))
    # In each of two layers: the queries, and one matrix per expert.
    assert "10 of 45 tensors differ" in told and "on mlp.experts.down_proj, q_proj" in told and "Warning" not in told


def test_types_that_differ_become_the_one_that_holds_all(base, checkpoint, tmp_path):
    state = tiny(2, dtype=torch.bfloat16).state_dict() | {NORM: torch.rand(32)}
    found, told = run(checkpoint(state, tiny(2)), tmp_path / "out", settings(base))
    assert all(t.dtype == torch.float32 and torch.equal(t, state[n].float()) for n, t in found.items())
    assert "float32, which holds all values; the checkpoint has bfloat16 and float32." in told


@pytest.mark.parametrize("text", [None, "{}", "x"])
def test_a_tokenizer_that_cannot_be_loaded_is_named(base, checkpoint, tmp_path, text):
    saved = checkpoint(tiny(2).state_dict(), tiny(2))
    (saved.huggingface / "tokenizer.json").unlink()
    if text:
        (saved.huggingface / "tokenizer.json").write_text(text)
    with pytest.raises(ExportError, match="the checkpoint's tokenizer cannot be loaded: "):
        run(saved, tmp_path / "out", settings(base))


def test_weights_beside_the_configuration_are_not_exported(base, checkpoint, tmp_path):
    """As actor.checkpoint.save_contents=[model,hf_model] leaves them, in bfloat16."""
    saved = checkpoint(tiny(2).state_dict(), tiny(2))
    tiny(3).save_pretrained(saved.huggingface, max_shard_size="50KB")
    found, _ = run(saved, tmp_path / "out", settings(base))
    assert [f.name for f in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]
    assert torch.equal(found[NORM], tiny(2).state_dict()[NORM])


def without(state, name):
    return {n: t for n, t in state.items() if n != name}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: without(s, NORM), f"config.yaml, the checkpoint lacks tensors: {NORM}"),
        (lambda s: s | {"v_head.weight": torch.ones(1, 32)}, "has unknown tensors: v_head.weight"),
        (lambda s: s | {NORM: torch.ones(31)}, f"has in another shape tensors: {NORM}"),
        (lambda s: s | {NORM: torch.full((32,), float("nan"))}, "training has diverged"),
        (lambda s: s | {NORM: torch.ones(32, dtype=torch.float64)}, f"{NORM} is float64; only float32, bfloat16"),
        (lambda s: s | {"lm_head.weight": torch.ones(278, 32)}, "config.json ties .* but they differ"),
    ],
    ids=["missing", "unknown", "shape", "not finite", "type", "tied"],
)
def test_an_odd_tensor_is_named(base, checkpoint, tmp_path, change, message):
    with pytest.raises(ExportError, match=message):
        run(checkpoint(change(tiny(2).state_dict()), tiny(2)), tmp_path / "out", settings(base))


def test_values_that_do_not_fit_the_type_asked_for_are_named(base, checkpoint, tmp_path):
    state = tiny(2).state_dict()
    state[NORM] = torch.full((32,), 1e5)
    with pytest.raises(ExportError, match=f"{NORM} has values that are not finite in float16"):
        run(checkpoint(state, tiny(2)), tmp_path / "out", settings(base), torch.float16)


@pytest.mark.parametrize(
    "given, note, message",
    [
        (dict(lora_rank=0), None, "actor_rollout_ref.model.lora_rank=0, but the checkpoint holds an adapter"),
        (dict(lora_alpha=None), None, "actor_rollout_ref.model.lora_alpha=None, but the checkpoint holds an adapter"),
        (dict(lora_alpha=32), {"r": 4, "lora_alpha": 10}, "alpha 32, but lora_train_meta.json beside .* alpha 10"),
        (dict(lora_rank=8), None, "has in another shape"),
        (dict(target_modules=["q_proj"]), None, "lacks tensors: base_model.model.model.layers.0.mlp.down_proj.weight"),
    ],
    ids=["rank 0", "no alpha", "another run's", "rank", "targets"],
)
def test_settings_that_are_not_the_checkpoints_are_named(base, checkpoint, tmp_path, given, note, message):
    state, _ = with_adapter(tiny(1))
    saved = checkpoint(state, tiny(1))
    if note:
        (saved.folder / "lora_train_meta.json").write_text(json.dumps(note))
    with pytest.raises(ExportError, match=message):
        run(saved, tmp_path / "out", settings(base, **given))


class Malicious:
    def __reduce__(self):
        return eval, ("(_ for _ in ()).throw(SystemExit('code of a checkpoint was run'))",)


def test_a_checkpoints_code_is_not_run(base, checkpoint, tmp_path):
    saved = checkpoint(tiny(2).state_dict(), tiny(2))
    torch.save({"model.norm.weight": Malicious()}, saved.folder / "model_world_size_2_rank_1.pt")
    with pytest.raises(ValueError, match="rank_1.pt cannot be read"):
        run(saved, tmp_path / "out", settings(base))


def test_ranks_that_do_not_fit_together_are_named(base, checkpoint, tmp_path):
    saved = checkpoint(tiny(2).state_dict(), tiny(2))
    file = saved.folder / "model_world_size_2_rank_1.pt"
    torch.save({"a": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="ranks 0 and 1 of .* hold different tensors"):
        Shards(saved.folder)
    torch.save([1], file)
    with pytest.raises(ValueError, match="holds something other than named tensors"):
        Shards(saved.folder)
    for rank, value in enumerate((1.0, 2.0)):
        torch.save({"a": torch.tensor(value)}, saved.folder / f"model_world_size_2_rank_{rank}.pt")
    with pytest.raises(ValueError, match="a is not sharded, but differs between ranks"):
        Shards(saved.folder)["a"]


@pytest.fixture
def megatron(tmp_path):
    """A checkpoint of Megatron without weights yet."""
    actor = tmp_path / "run/global_step_4/actor"
    (actor / "model/huggingface").mkdir(parents=True)
    tiny(1).config.save_pretrained(actor / "model/huggingface")
    build_tokenizer().save_pretrained(actor / "model/huggingface")
    (actor / "ckpt_contents.json").write_text('{"backend": {"peft": false}}')
    return Checkpoint(4, actor, megatron=True)


def test_megatrons_hugging_face_folder_is_exported_and_checked(base, megatron, tmp_path):
    trained = tiny(2, dtype=torch.bfloat16)
    trained.save_pretrained(megatron.huggingface)
    found, told = run(megatron, tmp_path / "out", settings(base))
    assert all(torch.equal(t, trained.state_dict()[n]) and t.dtype == torch.bfloat16 for n, t in found.items())
    assert "bfloat16, as in the checkpoint" in told and "24 of 24 tensors differ" in told and "within 0," in told


def test_megatrons_adapter_is_merged(base, megatron, tmp_path):
    from peft import LoraConfig, get_peft_model

    (megatron.folder / "ckpt_contents.json").write_text('{"backend": {"peft": true}}')
    with pytest.raises(ExportError, match="holds an adapter as Megatron shards only"):
        run(megatron, tmp_path / "refused", settings(base))
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), init_lora_weights=False)
    model = get_peft_model(tiny(1), config)
    model.save_pretrained(megatron.huggingface / "adapter")
    found, told = run(megatron, tmp_path / "out", settings(base))
    merged = model.merge_and_unload().state_dict()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=1e-6)
    assert "the adapter changes 6, of which 6 differ" in told and not (tmp_path / "out/adapter").exists()


def test_megatrons_own_shards_are_left_to_verls_merger(base, megatron, tmp_path, monkeypatch):
    (megatron.folder / "model/dist_ckpt").mkdir()
    commands = []

    def merge(command, **kwargs):
        commands.append(command)
        tiny(2, dtype=torch.bfloat16).save_pretrained(command[command.index("--target_dir") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", merge)
    _, told = run(megatron, tmp_path / "out", settings(base))
    assert commands[0][1:6] == ["-m", "verl.model_merger", "merge", "--backend", "megatron"]
    assert "24 of 24 tensors differ" in told and "Log-probabilities were not compared: Megatron's shards" in told
    for dtype, trained in ((torch.float32, "bfloat16"), (None, "float32")):
        given = settings(base) | {"actor_rollout_ref.actor.megatron.dtype": trained}
        with pytest.raises(ExportError, match="in bfloat16 only.*give --dtype bfloat16"):
            run(megatron, tmp_path / trained, given, dtype)
    failed = subprocess.CompletedProcess([], 1, "no shards")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(ExportError, match="merger failed(?s:.*)no shards"):
        run(megatron, tmp_path / "failed", settings(base))
