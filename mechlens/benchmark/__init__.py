"""The bench: how far each detector can be trusted, on data sets whose making and effect on students are
known.
"""
