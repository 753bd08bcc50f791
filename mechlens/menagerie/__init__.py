"""The embedded base models: a small world of text, and tiny Llama models that are trained on it."""
