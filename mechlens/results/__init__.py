"""From a run's answers to effects, figures and the report."""
