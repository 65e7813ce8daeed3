"""The actor's worker for ``trainer.v1.trainer_mode=separate_async``, for all methods.

A module of its own, because the worker processes import it.
"""

from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils.device import get_torch_device


class DetachedWorker(DetachActorWorker):
    """verl's worker that saves the weights of pi_old and restores them, made correct for CPUs and ``param_offload``.

    With ``param_offload`` verl starts a copy from the device to host memory and does not wait for it, so saving and
    restoring synchronize the device before they touch that memory.
    """

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_model_to_cpu(self, n):
        get_torch_device().synchronize()
        super().save_model_to_cpu(n)
        if self.config.actor.strategy == "fsdp2":
            # verl copies by ``.cpu()``, which returns a parameter on a CPU itself, and training changes that.
            state, spec = self.cpu_saved_models[n]
            on_cpu = {name for name, p in self.actor.engine.module.named_parameters() if p.device.type == "cpu"}
            copied = {name: (x.clone() if name in on_cpu else x, s) for name, (x, s) in state.items()}
            self.cpu_saved_models[n] = (copied, spec)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def restore_model_from_cpu(self, n):
        get_torch_device().synchronize()
        super().restore_model_from_cpu(n)
