"""The paper's experiments, each a short script on top of the library: `python -m experiments.<name> --help`."""
