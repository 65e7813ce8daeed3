"""New weights for a running vLLM on a CPU. verl mixes this class into vLLM's worker (``worker_extension_cls``)."""

from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


class CPUWorkerExtension(vLLMColocateWorkerExtension):
    """verl's, with vLLM's layerwise reload around the loading.

    On a CPU vLLM packs the weights of linear layers for oneDNN once they are loaded, and drops the plain ones: there is
    nothing left to load new weights into, verl's way ends in an AttributeError in this process and the training worker
    waits for ever. vLLM's layerwise reload restores the plain weights' shapes, and packs a layer anew as soon as all
    its weights have come.
    """

    def update_weights_from_ipc(self, peft_config=None, base_sync_done=False, use_shm=False):
        if peft_config and base_sync_done:  # an adapter; the layers keep their weights
            return super().update_weights_from_ipc(peft_config, base_sync_done, use_shm)
        models = list(super()._iter_all_models_with_config())
        self._loading_error = None
        with set_current_vllm_config(self.vllm_config):
            for model, _ in models:
                initialize_layerwise_reload(model)
            super().update_weights_from_ipc(peft_config, base_sync_done, use_shm)
            if self._loading_error:
                raise self._loading_error
            for model, model_config in models:
                finalize_layerwise_reload(model, model_config)

    def _update_weights(self, weights, *args, **kwargs):
        # An error must not keep the sender waiting: take and drop the other buckets, then raise it.
        if self._loading_error:
            return
        try:
            # vLLM keeps what it gets until a layer is complete; the sender overwrites it with the next bucket.
            super()._update_weights([(name, tensor.clone()) for name, tensor in weights], *args, **kwargs)
        except Exception as error:
            self._loading_error = error

    def _iter_all_models_with_config(self):
        return iter(())  # for verl's step after loading, which the layerwise reload has done
