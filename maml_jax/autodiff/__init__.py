"""Derivatives of the inner loop: forward over reverse, hoisting, trees and finite differences."""
