"""Every trainer against steps written by hand."""
