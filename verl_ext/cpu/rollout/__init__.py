"""The light rollout ``actor_rollout_ref.rollout.name=hf``: batched decoding by transformers, one Ray actor per replica.

- ``sampling``: the settings of a request, and the draw of one token from logits;
- ``generate``: decoding of one batch with a KV cache;
- ``server``: the Ray actor: queue, weights, life cycle (imports no verl, so it starts in seconds);
- ``replica``, ``adapter``: verl's handles of the server, in the trainer's process and in the training workers;
- ``batch_loop``: an agent-loop manager that sends a whole batch in one request.
"""
