"""Every refusal code: what it means and what to do. ``repfuse explain``, the plan and the docs read this table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Explanation:
    """What a refusal code means (``meaning``) and what the user can do (``hint``)."""

    title: str
    meaning: str
    hint: str


REFUSALS: dict[str, Explanation] = {
    "training-norm": Explanation(
        "a normalisation that uses the statistics of the batch",
        "A normalisation is an affine map only with frozen statistics. In training mode, or with "
        "track_running_stats=False, its scale depends on the input, so it cannot be folded into a weight.",
        "Call model.eval(), or train with track_running_stats=True.",
    ),
}
