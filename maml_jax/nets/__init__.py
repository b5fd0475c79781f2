"""Layers and networks with fast, exact derivatives of any order."""
