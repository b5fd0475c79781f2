"""What the reinforcement-learning experiments share."""
