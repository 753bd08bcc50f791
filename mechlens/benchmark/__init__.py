"""The bench: data sets whose making and whose effect on students are known, and how far each detector can be
trusted on them.
"""
