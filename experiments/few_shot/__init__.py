"""What the few-shot experiments share."""
