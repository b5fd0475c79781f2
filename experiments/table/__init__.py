"""The table of results beside published numbers, and its pages."""
