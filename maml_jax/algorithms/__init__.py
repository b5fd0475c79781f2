"""Meta-learning algorithms built on the inner loop and the outer step of MAML."""
