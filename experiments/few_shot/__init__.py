"""Code that the few-shot experiments share: the options of a run, the methods, and the evaluation."""
