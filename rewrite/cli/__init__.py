"""The command line: click commands, and the text of each result. No logic."""
