"""Training losses; needs torch alone."""
