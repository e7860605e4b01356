"""The mathematics between the base's layers; needs torch alone."""
