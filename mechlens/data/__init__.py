"""Users' files: what forms are read, the pairs in them, and treatments of them."""
