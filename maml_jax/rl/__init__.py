"""Meta-learning of policies: environments with the task as an array, and MAML on them, compiled whole."""
