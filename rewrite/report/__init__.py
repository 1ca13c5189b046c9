"""Inspection or Verification → a report for people: one HTML page, or Markdown with images beside it."""
