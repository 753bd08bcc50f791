"""Detectors: what a suspect data set says of who wrote it and what it would teach, from the cheapest access
to the dearest.
"""
