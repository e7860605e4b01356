"""Trainers: what a stock trainer needs to know about a shadow, and the data that people bring."""
