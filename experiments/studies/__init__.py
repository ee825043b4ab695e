"""What experiments share: the command line, several runs side by side, results."""
