"""The bench: how reliable each detector is, on data sets of known origin and known effect on students."""
