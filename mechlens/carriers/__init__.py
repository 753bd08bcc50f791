"""What teachers are asked to write: prompts of each carrier, and the rule that its rows must pass."""
