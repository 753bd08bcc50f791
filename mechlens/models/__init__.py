"""Bases and trained models: loading, chat templates, sampling, fine-tuning."""
