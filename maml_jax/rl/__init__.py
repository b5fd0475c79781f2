"""Meta-reinforcement learning: environments with the task as an array, policies, and MAML for policies."""
