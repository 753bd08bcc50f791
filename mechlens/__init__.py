"""mechlens: does this dataset carry a hidden trait, and why does it transfer?

Importing the package imports no model code; each command and page imports what it needs.
"""

__version__ = "0.1.0"
