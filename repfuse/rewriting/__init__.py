"""plan + module -> fused module. The module that is given is never changed."""

from repfuse.rewriting.rewriter import rewrite

__all__ = ["rewrite"]
