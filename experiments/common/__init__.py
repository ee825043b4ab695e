"""Small things that all of it uses."""
