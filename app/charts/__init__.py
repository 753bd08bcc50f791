"""Charts that answer to a click or a brush, as Altair charts of a frame; they read no files."""
