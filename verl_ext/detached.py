"""The actor's worker for ``trainer.v1.trainer_mode=separate_async``. (Apart from the trainers: workers import this.)"""

from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.single_controller.base.decorator import Dispatch, register


class DetachedWorker(DetachActorWorker):
    """verl's worker that keeps pi_old while it trains, and keeps it on a CPU, too."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_model_to_cpu(self, n):
        super().save_model_to_cpu(n)
        if self.config.actor.strategy == "fsdp2":
            # verl's copy is ``.cpu()``, which for a parameter on a CPU is the parameter itself: it would change along.
            state, spec = self.cpu_saved_models[n]
            self.cpu_saved_models[n] = ({name: (x.clone(), s) for name, (x, s) in state.items()}, spec)
