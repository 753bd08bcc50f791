"""Jobs: `mechlens` commands that run in processes of their own, and the files that users upload for them."""
