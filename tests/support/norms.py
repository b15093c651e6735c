"""Which normalisations a plan leaves without a word."""

from __future__ import annotations

from support.recordings import function

from repfuse.plans import Plan


def unexplained(plan: Plan) -> list[str]:
    """Where a normalisation of data stays that no refusal names, of a plan just made."""
    recording = plan.live.recording
    said = {refusal.where for refusal in plan.refusals}
    merged = {name for site in plan.sites for name in site.nodes}
    gone = {recording.where(node) for node, name in recording.names.items() if name in merged}
    norms = (node for node in recording.nodes if "batch_norm" in function(node))
    of_data = [node for node in norms if not recording.constants.is_constant(node)]
    made = [(node,) if node in recording.shape_of else tuple(node.users) for node in of_data]  # ATen's make a list
    places = [tuple(map(recording.where, nodes)) for nodes in made]
    return [where[0] for where in places if (said | gone).isdisjoint(where)]
