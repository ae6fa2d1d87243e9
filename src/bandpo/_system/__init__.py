"""What touches the machine: files, locks, caches, secrets, limits on what is read, and errors told in one line."""
