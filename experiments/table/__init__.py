"""The table of all rows beside the published numbers."""
