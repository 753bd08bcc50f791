"""The run folder: its layout, the steps that fill it, and the processes that execute them."""
