"""Subjects under audit, their adapters, verdicts and reports."""
