"""Query operators that mechanisms share."""
