"""The commands of the paper's experiments. `python -m experiments.NAME --help` lists the options of a command.

The paper is Finn, Abbeel and Levine 2017, Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks,
arXiv:1703.03400.
"""
