"""The actor's worker for ``trainer.v1.trainer_mode=separate_async``, for all methods.

Apart from the trainers, because the workers' processes import it.
"""

from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils.device import get_torch_device


class DetachedWorker(DetachActorWorker):
    """verl's worker that keeps pi_old while it trains, and keeps it on a CPU, too.

    With ``param_offload`` the weights lie in host memory, which a copy from the device may still be filling: verl
    starts it and goes on. So saving and restoring wait for the device before they touch that memory.
    """

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_model_to_cpu(self, n):
        get_torch_device().synchronize()
        super().save_model_to_cpu(n)
        if self.config.actor.strategy == "fsdp2":
            # verl's copy is ``.cpu()``. Of a parameter that lies on a CPU that is the parameter itself, which changes.
            state, spec = self.cpu_saved_models[n]
            on_cpu = {name for name, p in self.actor.engine.module.named_parameters() if p.device.type == "cpu"}
            copied = {name: (x.clone() if name in on_cpu else x, s) for name, (x, s) in state.items()}
            self.cpu_saved_models[n] = (copied, spec)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def restore_model_from_cpu(self, n):
        get_torch_device().synchronize()
        super().restore_model_from_cpu(n)
