"""The stages of an experiment: teach, generate, screen, distill, ask."""
