"""The live models of a run: the process that holds them, and the page that asks it."""
