"""The explorer's server: Streamlit, with the libraries of its pages imported before a visitor comes."""

from __future__ import annotations

import importlib
import sys

from streamlit.web import cli

LIBRARIES = ("altair", "mechlens.data.corpus", "mechlens.results.report", "mechlens.results.run")
"""what the pages import; a visitor would wait for it for more than a second"""

if __name__ == "__main__":
    for name in LIBRARIES:
        importlib.import_module(name)
    sys.exit(cli.main(prog_name="streamlit"))
