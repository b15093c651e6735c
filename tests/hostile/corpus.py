"""All attacks, by name."""

from __future__ import annotations

from .archives import ARCHIVES
from .attack import Attack
from .calling import CALLING
from .exports import EXPORTS
from .headers import HEADERS
from .legacy import LEGACY
from .nesting import NESTING
from .networks import NETWORKS
from .objects import OBJECTS
from .plans import PLANS
from .recipes import RECIPES
from .scripts import SCRIPTS
from .shards import SHARDS
from .snapshots import SNAPSHOTS
from .tensors import TENSORS

TABLES = {
    **{"pickle": CALLING, "archive": ARCHIVES, "tensor": TENSORS, "nesting": NESTING},
    **{"safetensors": HEADERS, "legacy": LEGACY, "recipe": RECIPES, "network": NETWORKS},
    **{"pt2": EXPORTS, "script": SCRIPTS, "shards": SHARDS, "snapshot": SNAPSHOTS, "plan": PLANS, "object": OBJECTS},
}
CORPUS: dict[str, Attack] = {
    f"{kind}: {name}": attack for kind, table in TABLES.items() for name, attack in table.items()
}
