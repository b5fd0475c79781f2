"""Code that all experiments share: the command line and plots."""
