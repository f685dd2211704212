"""Maintenance of a database: ``doctor`` examines and repairs it, ``preflight`` looks ahead at an upgrade."""
