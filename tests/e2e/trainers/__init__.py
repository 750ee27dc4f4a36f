"""Programs that the end-to-end tests submit as jobs."""
