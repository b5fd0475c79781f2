"""Differentiation through the inner loop: forward over reverse, hoisting, and checks by finite differences."""
