"""Views of images whose every draw is a function of (seed, step, example)."""
