"""Reports with pictures: rewrite/report."""
