"""The light rollout, ``actor_rollout_ref.rollout.name=hf``: batched decoding by transformers, one Ray actor a replica.

- ``sampling``: the settings of a request, and one token drawn from logits;
- ``generate``: decoding of one batch with a KV cache;
- ``server``: the Ray actor: queue, weights, life cycle (imports no verl, so it is up in seconds);
- ``replica``, ``adapter``: verl's two ends of it, in the trainer's process and in the training workers;
- ``batch_loop``: an agent-loop manager that makes one request of a whole batch.
"""
