"""Measurements that several lenses share."""
