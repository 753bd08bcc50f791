"""Detectors: who wrote a suspect data set, and what it would teach a student."""
