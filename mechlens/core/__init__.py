"""Values and arithmetic: errors, seeds, specs, traits, table schemas, statistics. Nothing here loads a model."""
