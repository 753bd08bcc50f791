"""Evaluations of students on public test sets."""
