"""Constructors of networks with released weights."""
