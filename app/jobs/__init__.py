"""Jobs: `mechlens` commands in separate processes, and the files that users upload for them."""
