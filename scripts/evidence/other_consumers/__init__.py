"""What other consumers than the engines of the loader matrix make of the fixtures. See README.md."""
