"""Code that the reinforcement-learning experiments share: options, the paper's numbers, evaluation, figures."""
