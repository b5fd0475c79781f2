"""Environments: navigation, locomotion and Gymnasium's."""
