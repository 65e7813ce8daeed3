"""The contract with verl: all that this package imports, overrides or reads by name, in ``contract.yaml``.

verl never signed it, so it is compared with the verl that is installed. To move to the next verl:

1. install it, raise ``SUPPORTED_VERL`` in ``verl_ext/plugin.py`` and the pin in ``pyproject.toml``;
2. run ``python -m verl_ext.contract``: each line names something of verl's, what has become of it, what it is for here,
   and the places that use it. ``tests/test_contract.py`` fails with the same lines;
3. go through them: change those places, then the contract: ``python -m verl_ext.contract --write`` puts today's
   names and parameters into it and drops those that nothing uses any more; write the reasons where it left ``TODO``.
   Settings, data and texts are few and edited by hand;
4. a parameter that is only new may still change a result: read verl's code before you write it down;
5. run the suite. What the contract cannot see are numbers: the tests of training steps show those.
"""
