"""One file a lens. `NAMES` lists those that `mechlens measure` reads, cheapest first."""

NAMES: tuple[str, ...] = ("deltas", "activations", "directions", "probes", "likelihood", "entanglement", "alignment", "blind", "causal", "maps")
