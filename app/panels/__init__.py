"""One module a panel: what several pages draw, and the frame that every panel has."""
