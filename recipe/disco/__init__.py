"""DisCO: Discriminative Constrained Optimization (Li et al., NeurIPS 2025, arXiv 2505.12366).

:func:`disco_loss` is the method's executable definition; ``README.md`` beside this file is its page.
"""

from recipe.disco.loss import disco_loss

__all__ = ["disco_loss"]
