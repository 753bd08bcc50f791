"""One file a lens. `NAMES` lists those that `mechlens measure` reads, cheapest first."""

NAMES = (
    "deltas",
    "activations",
    "directions",
    "probes",
    "likelihood",
    "entanglement",
    "alignment",
    "blind",
    "causal",
    "rows",
    "maps",
)
