"""Values and arithmetic: errors, seeds, specs, traits, table schemas, statistics. No module loads a model."""
