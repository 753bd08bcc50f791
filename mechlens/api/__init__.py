"""Models behind an API: the client, its budget, fine-tuning jobs."""
