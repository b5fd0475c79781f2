"""Meta-learning algorithms beside MAML."""
