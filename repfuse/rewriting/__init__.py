"""plan + module -> fused module. The module that is given is never changed."""

from repfuse.rewriting.rewriter import lay_out_plan, rewrite

__all__ = ["lay_out_plan", "rewrite"]
